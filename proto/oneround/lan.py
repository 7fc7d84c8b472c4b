"""The local network: which addresses of this machine others can reach, and what a coordinator says of itself there.

Anybody may say the same: what is heard tells where to look, and never whom to trust.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

SERVICE = "_oneround._tcp.local."
KEY = b"key"  # of the record that holds the fingerprint of the coordinator's key
LOOPBACK = "127.0.0.1"

# Networks that end on this machine, or lead somewhere else: containers, virtual machines, tunnels, Apple's own radio.
_ELSEWHERE = re.compile(
    r"(docker|podman|br-|veth|virbr|vnet|vmnet|vboxnet|bridge1|cni|cali|flannel|lxc|lxd|"
    r"tun|tap|utun|wg|tailscale|zt|ppp|ipsec|gif|stf|nordlynx|awdl|llw|anpi)"
)


@dataclass(frozen=True)
class Interface:
    """A network interface; `flags` are the system's, as `up` or `pointopoint`."""

    name: str
    flags: frozenset[str]
    addresses: tuple[str, ...]


def interfaces() -> list[Interface]:
    """Those of this machine."""
    stats = psutil.net_if_stats()
    return [
        Interface(
            name,
            frozenset(stats[name].flags.split(",")) | ({"up"} if stats[name].isup else set()),
            tuple(a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)),
        )
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats
    ]


def reachable(interfaces: Iterable[Interface]) -> list[str]:
    """The addresses that others on the local network can reach, IPv4 first.

    IPv6 addresses that hold on one link alone are left out: they mean nothing without the interface's name over there.
    """
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for interface in interfaces:
        if not passed_over(interface):
            addresses += _addresses(interface)
    return [str(address) for address in sorted(addresses, key=lambda a: (a.version, a.is_link_local))]


def passed_over(interface: Interface) -> str:
    """Why nobody on the local network reaches this machine through an interface; empty when they can."""
    if "up" not in interface.flags:
        return "down"
    if "pointopoint" in interface.flags:
        return "a tunnel"
    if _ELSEWHERE.match(interface.name):
        return "for containers, virtual machines, tunnels or Apple's own radio, by its name"
    if not _addresses(interface):
        loopback = any(ipaddress.ip_address(text.partition("%")[0]).is_loopback for text in interface.addresses)
        return "this machine alone" if loopback else "no address that means anything elsewhere"
    return ""


def _addresses(interface: Interface) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in interface.addresses]
    return [a for a in addresses if not a.is_loopback and not (a.version == 6 and a.is_link_local)]


def listening(host: str, interfaces: Iterable[Interface]) -> list[str]:
    """The addresses at which a server is reached that listens on `host`; none when it is on no network."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return []  # a name, which whoever uses names knows already
    if not address.is_unspecified:
        return [str(address)]
    everywhere = reachable(interfaces)
    return everywhere if address.version == 6 else [text for text in everywhere if ":" not in text]


def join_host(host: str, port: int) -> str:
    """HOST:PORT, as gRPC takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def fingerprint(properties: Mapping[bytes, bytes | None]) -> str:
    """The key's fingerprint in a record from the network; empty when there is none, or it cannot be one."""
    text = (properties.get(KEY) or b"").decode("ascii", "replace")
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else ""


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is on this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
