"""A coordinator that goes away, comes back or moves while a client is at work; and a network that breaks."""

import asyncio
import json
import socket
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest

from coordinator import discovery as advertising
from coordinator.auth import identity
from coordinator.jobs import spec
from edge_client import outbox, session
from edge_client.connection import connect, retry
from edge_client.connection.channel import Connection
from edge_client.connection.remote import Remote
from edge_client.connection.target import Target
from edge_client.ui.screen import Screen
from oneround.errors import Unreachable
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.daemons import SPEC, running
from tests.fakes import FakeBackend, RecordingScreen
from tests.network import Relay, ip
from tests.participants import participant
from tests.waiting import LONG

LARGE = {**SPEC, "lora": {"rank": 64, "target_modules": ["all-linear"]}, "upload": {"dtype": "float32"}}


async def take_part(address: str, who: session.Participant, screen: Screen) -> pb.Receipt:
    async with connect.connected(Target(address), who.state, screen) as remote:
        return await session.take_part(remote, "notes", who, screen)


async def test_a_network_that_breaks_costs_what_was_on_its_way(tmp_path: Path) -> None:
    """While the base comes, while the adapter goes, and by a daemon that starts again meanwhile."""

    who, screen = participant(tmp_path, FakeBackend()), RecordingScreen()
    async with Relay() as wire:
        async with running(tmp_path / "one") as (daemon, wire.target):
            await daemon.operator.submit(spec.parse(LARGE))
            wire.cut_at_down = [2_000_000, 4_000_000]
            receiving = asyncio.create_task(take_part(wire.address, who, screen))
            await screen.until("trained")
            assert screen.times("retry") > 0 and not wire.cut_at_down
            sizes = sum(file.stat().st_size for file in (who.state / "models").rglob("*") if file.is_file())
            (box,) = outbox.all_outboxes(who.state)
            assert wire.down < 1.3 * (sizes + box.initial.stat().st_size), "downloads go on where they broke off"
            size, before = box.adapter.stat().st_size, wire.up
            wire.cut_at_up = [before + size // 3]
            wire.broken.clear()
            async with asyncio.timeout(LONG):
                await wire.broken.wait()
            wire.target = ""
        async with running(tmp_path / "one") as (daemon, wire.target):
            receipt = await receiving
        assert receipt.size == size
        assert wire.up - before < 1.3 * size, "the upload goes on where it broke off"
        assert screen.times("moved") == 0 and screen.times("pinned") == 1


@pytest.mark.parametrize("during", ["training", "sending"])
async def test_a_coordinator_that_moves_meanwhile_is_found_by_its_key(tmp_path: Path, during: str) -> None:
    go_on = threading.Event()
    who, screen = participant(tmp_path, FakeBackend(lambda _: go_on.wait(LONG))), RecordingScreen()
    async with running(tmp_path / "one") as (daemon, before):
        await daemon.operator.submit(spec.parse(SPEC))
        receiving = asyncio.create_task(take_part(before, who, screen))
        await screen.until("plan")
    if during == "sending":
        go_on.set()
        await screen.until("retry")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections to it may still be closing
        taken.bind(("127.0.0.1", int(before.rpartition(":")[2])))  # so that the next daemon gets another port
        async with running(tmp_path / "one") as (_, after):
            key = identity.load_or_create(tmp_path / "one").fingerprint
            saying = asyncio.create_task(advertising.advertise("127.0.0.1", int(after.rpartition(":")[2]), key))
            await screen.until("moved")
            go_on.set()
            receipt = await receiving
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)
    assert dict(screen.said)["moved"] == {"before": before, "server": after}
    (box,) = outbox.all_outboxes(who.state)
    assert box.receipt() == receipt and box.server() == after


async def test_a_coordinator_is_found_where_it_was_before(tmp_path: Path) -> None:
    """Without mDNS: at an address of another day, as with a cable here and Wi-Fi there."""

    screen = RecordingScreen()
    async with Relay() as cable, Relay() as wifi, running(tmp_path / "one") as (_, there):
        for wire in (cable, wifi):
            wire.target = there
            async with connect.connected(Target(wire.address), tmp_path, screen):
                pass
        async with connect.connected(Target(cable.address), tmp_path, screen) as remote:
            assert not await remote.find_again(cable.address), "it answers there, so there it stays"
            cable.target = ""
            cable.cut()
            assert await remote.find_again(cable.address)
            assert remote.server == wifi.address and not (await remote.jobs()).jobs
            assert await remote.find_again(cable.address), "found already, for another who has lost it"


class Away(Remote):
    """Nobody, anywhere."""

    def __init__(self) -> None:
        super().__init__(Connection("nowhere:1", grpc.aio.insecure_channel("127.0.0.1:1")))
        self.looked = 0

    async def find_again(self, lost: str) -> bool:
        self.looked += 1
        return False


async def test_only_the_deadline_ends_the_trying() -> None:
    remote, screen, tries = Away(), RecordingScreen(), 0

    async def never(_: object) -> None:
        nonlocal tries
        tries += 1
        raise Unreachable("nobody answers")

    now = asyncio.get_running_loop().time()
    with pytest.raises(Unreachable, match="nobody answers"):
        await retry.through(remote, time.time() + 2.5, screen, never)
    assert asyncio.get_running_loop().time() - now > 2.4
    assert 2 <= tries <= 6 and remote.looked == tries - 2
    assert screen.times("retry") == 1, "the same trouble is told once"


def test_pauses_grow_and_differ() -> None:
    many = [[next(waits) for _ in range(12)] for waits in (retry.pauses() for _ in range(20))]
    assert all(0.5 <= row[0] <= 1.5 and 2 <= row[2] <= 6 and 30 <= row[9] <= 60 for row in many)
    assert len({row[0] for row in many}) > 1


@pytest.mark.slow  # a connection is given up after 20 s in which nothing gets across
def test_a_laptop_whose_own_address_changes(namespaces: tuple[str, str], tmp_path: Path) -> None:
    """In the middle of a download, on a cable of 8 Mbit/s, between real processes in two network namespaces."""
    here, there = (("ip", "netns", "exec", name) for name in namespaces)
    slowly = ("dev", "lan0", "root", "tbf", "rate", "8mbit", "burst", "32kb", "latency", "400ms")
    subprocess.run([*there, "tc", "qdisc", "add", *slowly], check=True)
    base = Path(__file__).parents[3] / "benchmarks" / "base"
    (tmp_path / "job.toml").write_text(f'name = "notes"\n[model]\nbase = "{base}"\n[lora]\nrank = 2\n')
    (tmp_path / "notes.txt").write_text("for line in file:\n    print(line)\n" * 100)
    serves = (commands.BIN / "coordinator", "serve", "--listen", "10.77.0.2:50051", "--no-advertise")
    joins = (
        commands.BIN / "edge-client",
        "join",
        "--yes",
        "--json",
        "--server",
        "10.77.0.2:50051",
        "--backend",
        "torch",
    )
    with (tmp_path / "log").open("w") as log:
        job_file = ("--job", tmp_path / "job.toml", "--state", tmp_path / "coordinator")
        daemon = subprocess.Popen([*there, *serves, *job_file], stdout=log, stderr=log)
        try:
            while not (tmp_path / "coordinator" / "daemon.json").exists():
                assert daemon.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            data = ("--data", tmp_path / "notes.txt", "--state", tmp_path / "client")
            said = []
            with subprocess.Popen([*here, *joins, *data], stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                for line in client.stdout:
                    said.append(json.loads(line))
                    if said[-1].get("what") == "base" and said[-1]["done"] > 2_000_000:
                        break
                ip("-n", namespaces[0], "addr", "del", "10.77.0.1/24", "dev", "lan0")
                ip("-n", namespaces[0], "addr", "add", "10.77.0.9/24", "dev", "lan0")
                said += map(json.loads, client.stdout)
            assert client.returncode == 0, said
        finally:
            daemon.terminate()
            daemon.wait()
    events = [each["event"] for each in said]
    assert "retry" in events and "moved" not in events and events[-1] == "done"
