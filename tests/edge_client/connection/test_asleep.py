"""A laptop whose lid is closed: its process stands still in the middle, its connections may be gone when it wakes up,
and it goes on as if nothing had been."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from converters import adapter
from coordinator.daemon import Daemon
from coordinator.jobs import spec
from coordinator.jobs.leases import ASLEEP_AFTER
from edge_client import outbox
from oneround.v1 import federation_pb2 as pb
from tests.daemons import SPEC, running
from tests.waiting import LONG

ASLEEP_SECONDS = 4.0  # longer than between two heartbeats
LATER = 2 * ASLEEP_AFTER  # what passes for the coordinator in that time


class Clock:
    """The coordinator's, which a test puts forward."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Line:
    """What is between a client and its coordinator: it can be cut, and it can hold back what is sent."""

    def __init__(self, coordinator: str) -> None:
        self._coordinator = coordinator
        self._writers: set[asyncio.StreamWriter] = set()
        self.sent = 0  # bytes from the client
        self.hold_after: int | None = None  # bytes from the client that pass
        self.held = asyncio.Event()
        self.go_on = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            host, port = server.sockets[0].getsockname()
            yield f"{host}:{port}"
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        """As a router forgets a connection, but at once."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._coordinator.rpartition(":")
        there, away = await asyncio.open_connection(host, int(port))
        self._writers |= {writer, away}
        await asyncio.gather(self._up(reader, away), self._down(there, writer), return_exceptions=True)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(16 * 1024):
            self.sent += len(data)
            if self.hold_after is not None and self.sent > self.hold_after and not self.go_on.is_set():
                self.held.set()
                await self.go_on.wait()
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(16 * 1024):
            writer.write(data)
            await writer.drain()
        writer.close()


class Client:
    """`edge-client join` as a process, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said: list[dict[str, object]] = []

    @classmethod
    async def join(cls, server: str, folder: Path, state: str) -> "Client":
        data = folder / "notes.jsonl"
        data.write_text("".join(f'{{"text": "def f{n}(x): return x + {n}"}}\n' for n in range(60)))
        arguments = (
            "join",
            "--yes",
            "--server",
            server,
            "--data",
            data,
            "--state",
            folder / state,
            "--json",
            "--backend",
            "torch",
        )
        process = await asyncio.create_subprocess_exec(
            *map(str, (sys.executable, "-m", "edge_client.cli", *arguments)), stdout=asyncio.subprocess.PIPE
        )
        return cls(process)

    async def until(self, event: str, **fields: object) -> None:
        """Read what it says until it says this."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.said.append(json.loads(line))
            if self.said[-1]["event"] == event and fields.items() <= self.said[-1].items():
                return
        raise AssertionError(f"it ended without {event}: {self.said}")

    async def sleep(self, daemon: Daemon, clock: Clock) -> pb.Phase.ValueType:
        """Stand still for a while, which is a longer one for the coordinator; returns what it took the client for."""
        self._process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(ASLEEP_SECONDS)
        clock.ahead += LATER
        (client,) = (await daemon.operator.status("notes")).clients
        return client.phase

    def wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def end(self) -> None:
        await self.until("done")
        assert await asyncio.wait_for(self._process.wait(), LONG) == 0

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


SLEEPY = {
    **SPEC,
    "lora": {"rank": 64},  # megabytes to send, so that there is a middle
    "train": {"batch_size": 2, "max_seq_len": 32, "epochs": 1},
    "upload": {"dtype": "float32"},
}


@pytest.mark.parametrize(
    ("during", "cut"),
    [
        pytest.param("training", False, id="training, connected"),
        pytest.param("training", True, id="training, cut off", marks=pytest.mark.slow),
        pytest.param("sending", False, id="sending, connected", marks=pytest.mark.slow),
        pytest.param("sending", True, id="sending, cut off"),
    ],
)
async def test_a_client_that_slept_finishes(tmp_path: Path, during: str, cut: bool) -> None:
    """The seconds for which it stands still are what it is about; the rest is a real client that starts and trains."""
    clock = Clock()

    before = 0
    async with running(tmp_path / "one", clock) as (daemon, address):
        await daemon.operator.submit(spec.parse(SLEEPY))
        line = Line(address)
        async with line.open() as server:
            client = await Client.join(server, tmp_path, "client")
            try:
                if during == "training":
                    await client.until("progress", what="training")
                    assert client.said[-1]["done"] < client.said[-1]["total"]  # type: ignore[operator]
                else:
                    await client.until("trained")
                    before = line.sent
                    line.hold_after = before + 3_000_000
                    await asyncio.wait_for(line.held.wait(), LONG)
                phase = await client.sleep(daemon, clock)
                assert phase == (pb.PHASE_ASLEEP if during == "training" else pb.PHASE_UPLOADING)
                if cut:
                    line.cut()
                    await asyncio.sleep(0.5)
                line.go_on.set()
                client.wake()
                await client.end()
            finally:
                client.kill()
        (shown,) = (await daemon.operator.status("notes")).clients
        box = outbox.find(tmp_path / "client", "notes")
        declared = box.trained()
        assert declared is not None and shown.phase == pb.PHASE_CONTRIBUTED
        assert shown.contribution.declaration.digest == declared.digest, "one upload, whole"
        assert adapter.read(box.adapter).modules
        events = [said["event"] for said in client.said]
        assert events.count("receipt") == events.count("trained") == 1
        if during == "sending":
            assert declared.size > 5_000_000 and line.sent - before < declared.size + 1_500_000, "it went on"
            assert ("retry" in events) == cut
