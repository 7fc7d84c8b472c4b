"""Finding a coordinator: by mDNS on loopback, between two network namespaces, and again after it has moved."""

import asyncio
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from coordinator import discovery as advertising
from coordinator.auth import identity
from edge_client.connection import discovery
from edge_client.connection.discovery import DiscoveredCoordinator
from edge_client.connection.identity import Pins
from oneround import lan, tls
from oneround.errors import Unreachable, UsageError
from tests import commands, terminal
from tests.waiting import eventually

ROOT = Path(__file__).parents[3]


def found(name: str, address: str = "192.0.2.1:50051") -> DiscoveredCoordinator:
    return DiscoveredCoordinator(name, (address,), "ab" * 32)


async def until(fingerprint: str, there: bool) -> list[DiscoveredCoordinator]:
    """Look until a coordinator is there, or is not there any more."""
    for _ in range(100):
        seen = await discovery.look(1.0, enough=lambda each: there and each.fingerprint == fingerprint)
        if any(each.fingerprint == fingerprint for each in seen) == there:
            return [each for each in seen if each.fingerprint == fingerprint]
    raise AssertionError(f"{fingerprint} is {'not' if there else 'still'} there")


async def test_a_coordinator_says_where_it_is_and_says_goodbye() -> None:
    key = os.urandom(32).hex()

    saying = asyncio.create_task(advertising.advertise("127.0.0.1", 50999, key, name="ward-9.local"))
    (seen,) = await until(key, there=True)
    assert seen == DiscoveredCoordinator(f"ward-9 {key[:8]}", ("127.0.0.1:50999",), key)
    saying.cancel()
    await asyncio.gather(saying, return_exceptions=True)
    await until(key, there=False)


@pytest.mark.skipif(not lan.reachable(lan.interfaces()), reason="this machine is on no network")
async def test_a_coordinator_that_comes_onto_a_network_says_so() -> None:
    key, networks = os.urandom(32).hex(), [[], lan.interfaces()]

    saying = asyncio.create_task(
        advertising.advertise(
            "0.0.0.0", 50998, key, interfaces=lambda: networks.pop(0) if len(networks) > 1 else networks[0], every=1
        )
    )
    (seen,) = await until(key, there=True)
    reachable = [address for address in lan.reachable(lan.interfaces()) if ":" not in address]
    assert list(seen.addresses) == [f"{address}:50998" for address in reachable]
    saying.cancel()
    await asyncio.gather(saying, return_exceptions=True)


@pytest.mark.parametrize(
    ("port", "addresses", "properties"),
    [
        (0, ["192.0.2.1"], {lan.KEY: b"ab" * 32}),
        (50051, [], {lan.KEY: b"ab" * 32}),
        (50051, ["224.0.0.9"], {lan.KEY: b"ab" * 32}),
        (50051, ["192.0.2.1"], {}),
        (50051, ["192.0.2.1"], {lan.KEY: b"../../etc"}),
    ],
)
def test_a_record_that_cannot_be_a_coordinators(
    port: int, addresses: list[str], properties: dict[bytes, bytes]
) -> None:
    packed = [ipaddress.ip_address(address).packed for address in addresses]
    info = AsyncServiceInfo(lan.SERVICE, f"x.{lan.SERVICE}", port=port, addresses=packed, properties=properties)
    assert discovery.read(info) is None


def test_a_name_from_the_network_is_short_and_printable() -> None:
    packed = [ipaddress.ip_address(address).packed for address in ("2001:db8::1", "192.0.2.1")]
    name = f"ward\u202e{'9' * 40}.{lan.SERVICE}"  # turns the line around; zeroconf itself refuses control characters
    info = AsyncServiceInfo(lan.SERVICE, name, port=1, addresses=packed, properties={lan.KEY: b"ab" * 32})
    seen = discovery.read(info)
    assert seen is not None
    assert seen.name.isprintable() and len(seen.name) <= 64
    assert seen.addresses == ("192.0.2.1:1", "[2001:db8::1]:1")


def test_the_only_one_is_taken_and_several_are_named() -> None:
    assert discovery.only([found("a")]) == found("a")
    with pytest.raises(Unreachable, match="no coordinator makes itself known"):
        discovery.only([])
    with pytest.raises(UsageError, match=r"a at 192\.0\.2\.1:50051, b at 192\.0\.2\.2:1"):
        discovery.only([found("a"), found("b", "192.0.2.2:1")])


def test_discover_lists_a_coordinator(tmp_path: Path) -> None:
    with commands.coordinator(tmp_path / "coordinator", advertise=True) as address:
        out, _ = commands.run("edge-client", "discover", "--json", "--state", tmp_path / "client")
        (seen,) = [each for each in json.loads(out) if each["addresses"] == [address]]
        assert seen["known"] is False
        out, _ = commands.run("edge-client", "discover", "--seconds", 1, "--state", tmp_path / "client")
        assert seen["name"] in out and address in out


def test_a_coordinator_that_moves_is_found_again_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "def f(x):\\n    return x"}\n' * 12)
    (tmp_path / "job.toml").write_text(
        f'name = "moves"\n[model]\nbase = "{ROOT / "benchmarks" / "base"}"\n[lora]\nrank = 2\n'
        "[train]\nepochs = 1\nmax_seq_len = 32\n[round]\nmin_clients = 5\n"
    )
    common = ("--json", "--state", tmp_path / "client")
    joins = ("join", "--yes", "--data", tmp_path / "notes.jsonl", "--backend", "torch", *common)
    with commands.coordinator(tmp_path / "coordinator") as before:
        commands.run("coordinator", "submit", tmp_path / "job.toml", "--state", tmp_path / "coordinator")
        first, _ = commands.run("edge-client", *joins, "--server", before)
    _, refused = commands.run("edge-client", *joins, code=4)
    assert before in refused
    with commands.coordinator(tmp_path / "coordinator", advertise=True) as after:
        assert after != before
        again, _ = commands.run("edge-client", *joins)
        events = commands.events(again)
        assert (events["moved"]["before"], events["moved"]["server"]) == (before, after)
        assert "pinned" not in events, "it is the same key"
        assert events["receipt"]["digest"] == commands.events(first)["receipt"]["digest"]
        left, _ = commands.run("edge-client", "leave", "moves", *common)
        assert "moved" not in commands.events(left), "the new address is kept"


def test_of_several_coordinators_a_person_chooses_one(tmp_path: Path) -> None:
    pulls = ("pull", "notes", "--state", tmp_path / "client")
    with (
        commands.coordinator(tmp_path / "one", advertise=True) as one,
        commands.coordinator(tmp_path / "two", advertise=True) as two,
    ):
        _, err = commands.run("edge-client", *pulls, code=2)
        assert "several coordinators" in err and one in err and two in err and "add --server" in err
        asked = "Is it the same there?"
        for keys, code, says in (("", 2, "no coordinator was chosen"), ("0\nx\n", 3, f"First time at {two}")):
            with terminal.running("edge-client", *pulls, columns=120) as screen:
                screen.expect("Which one?")
                rows = screen.text.splitlines()
                (number,) = [row.split()[0] for row in rows if f" at {two}, key " in row]
                assert any(f" at {one}, key " in row for row in rows)
                screen.type(f"{keys}{number}\n" if keys else "\x04")  # Ctrl-D
                if keys:
                    screen.expect(f"The coordinator at {two} is not known here")
                    screen.expect(asked)
                    screen.type("y\n")
                assert says in screen.finish(code=code)


ADVERTISE = """
import asyncio
from coordinator.discovery import advertise
asyncio.run(advertise("[::]", 50051, "cd" * 32, name="ward-1"))
"""


def test_from_one_machine_to_another(namespaces: tuple[str, str], tmp_path: Path) -> None:
    here, there = namespaces
    inside = ("ip", "netns", "exec")
    path = os.pathsep.join([str(ROOT), str(ROOT / "proto")])
    saying = subprocess.Popen(
        [*inside, there, sys.executable, "-c", ADVERTISE],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = (str(commands.BIN / "edge-client"), "discover", "--json", "--state", str(tmp_path))
        for _ in range(50):
            listed = subprocess.run([*inside, here, *client], check=True, capture_output=True, text=True).stdout
            if json.loads(listed):
                break
        (seen,) = json.loads(listed)
        assert (seen["name"], seen["fingerprint"]) == ("ward-1 cdcdcdcd", "cd" * 32)
        assert seen["addresses"] == ["10.77.0.2:50051", "[fd77::2]:50051"]
    finally:
        saying.terminate()
        saying.wait()


def test_a_hostile_coordinator_on_the_same_network(namespaces: tuple[str, str], tmp_path: Path) -> None:
    """It has the true one's name, and says its own key or the true one's: what is said is never believed."""
    here, there = (("ip", "netns", "exec", name) for name in namespaces)
    keys = [identity.load_or_create(tmp_path / name).fingerprint for name in ("true", "hostile")]
    client, address = tmp_path / "client", "10.77.0.2:50666"

    @contextmanager
    def started(*arguments: object) -> Iterator[None]:
        process = subprocess.Popen([*there, *map(str, arguments)], env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def saying(key: str) -> AbstractContextManager[None]:
        program = f"asyncio.run(advertise('10.77.0.2', 50666, '{key}', name='ward-1'))"
        return started(sys.executable, "-c", f"import asyncio\nfrom coordinator.discovery import advertise\n{program}")

    def refused(*options: str) -> str:
        pulls = [*here, str(commands.BIN / "edge-client"), "pull", "notes", "--state", str(client), *options]
        for _ in range(50):
            done = subprocess.run(pulls, env=env, capture_output=True, text=True, check=False)
            if "no coordinator makes itself known" not in done.stderr:
                break
        assert done.returncode == 3 and not done.stdout.count("First time"), done.stderr
        return done.stderr

    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])}
    serves = (commands.BIN / "coordinator", "serve", "--state", tmp_path / "hostile", "--no-advertise")
    with (tmp_path / "log").open("w") as log, started(*serves, "--listen", address):
        assert eventually((tmp_path / "hostile" / "daemon.json").exists)
        with saying(keys[1]):
            err = refused()
            assert address in err and "only heard of on this network" in err and f"--trust {keys[1]}" in err
            assert "another key than you trust" in refused("--trust", keys[0])
            assert not Pins(client).all()
        Pins(client).pin("10.77.0.2:50051", keys[0])
        with saying(keys[0]):
            err = refused()
            assert "one with another answers there" in err and all(tls.grouped(key) in err for key in keys)
    assert Pins(client).all() == {"10.77.0.2:50051": keys[0]}
