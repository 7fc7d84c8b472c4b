"""Which addresses a coordinator names, and what is believed of what a network says."""

import pytest

from oneround import lan
from oneround.lan import Interface

UP = frozenset({"up", "broadcast", "running", "multicast"})

LINUX = [
    Interface("lo", UP | {"loopback"}, ("127.0.0.1", "::1")),
    Interface("enp3s0", UP, ("192.168.1.20", "fd12::20", "fe80::1%enp3s0")),
    Interface("wlan0", UP, ("192.168.1.21",)),
    Interface("eth1", frozenset({"broadcast"}), ("10.9.9.9",)),  # down
    Interface("docker0", UP, ("172.17.0.1",)),
    Interface("br-0a1b2c", UP, ("172.18.0.1",)),
    Interface("veth12ab", UP, ("fd00::5",)),
    Interface("virbr0", UP, ("192.168.122.1",)),
    Interface("wg0", UP, ("10.8.0.2",)),
    Interface("tailscale0", UP, ("100.101.1.2",)),
    Interface("work", UP | {"pointopoint"}, ("10.20.0.7",)),  # a VPN of any name
]
MACOS = [
    Interface("lo0", UP, ("127.0.0.1", "::1", "fe80::1%lo0")),
    Interface("en0", UP, ("fe80::c:2%en0", "10.0.0.5")),
    Interface("en5", UP, ("169.254.10.10",)),  # a cable between two laptops
    Interface("awdl0", UP, ("fe80::2%awdl0",)),
    Interface("utun3", UP | {"pointopoint"}, ("10.64.0.2",)),
    Interface("bridge100", UP, ("192.168.64.1",)),
]


def test_only_the_local_network_counts() -> None:
    assert lan.reachable(LINUX) == ["192.168.1.20", "192.168.1.21", "fd12::20"]
    assert lan.reachable(MACOS) == ["10.0.0.5", "169.254.10.10"]


def test_each_interface_that_does_not_count_says_why() -> None:
    why = {interface.name: lan.passed_over(interface) for interface in LINUX + MACOS}
    assert [name for name, reason in why.items() if not reason] == ["enp3s0", "wlan0", "en0", "en5"]
    assert (why["lo"], why["eth1"], why["work"]) == ("this machine alone", "down", "a tunnel")
    assert "containers" in why["docker0"] and "radio" in why["awdl0"]
    assert lan.passed_over(Interface("eth2", UP, ("fe80::9%eth2",))) == "no address that means anything elsewhere"


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("0.0.0.0", ["192.168.1.20", "192.168.1.21"]),
        ("[::]", ["192.168.1.20", "192.168.1.21", "fd12::20"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("172.17.0.1", ["172.17.0.1"]),  # who asks for it by name means it
        ("coordinator.example", []),
    ],
)
def test_the_addresses_of_a_server(host: str, addresses: list[str]) -> None:
    assert lan.listening(host, LINUX) == addresses


def test_this_machine_has_a_loopback() -> None:
    assert any(lan.LOOPBACK in interface.addresses and "up" in interface.flags for interface in lan.interfaces())


@pytest.mark.parametrize(
    ("properties", "fingerprint"),
    [
        ({lan.KEY: b"ab" * 32}, "ab" * 32),
        ({}, ""),
        ({lan.KEY: None}, ""),
        ({lan.KEY: b"AB" * 32}, ""),
        ({lan.KEY: b"\xff" * 64}, ""),
        ({lan.KEY: b"ab" * 32 + b"\n"}, ""),
    ],
)
def test_a_fingerprint_from_the_network(properties: dict[bytes, bytes | None], fingerprint: str) -> None:
    assert lan.fingerprint(properties) == fingerprint
