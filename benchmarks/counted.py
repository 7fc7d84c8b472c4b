"""A stretch of network on 127.0.0.1 that counts what passes: a client connects to it as it would to the coordinator.

Counted is what TCP carries, so TLS and everything in it, and not the headers of TCP and IP (some 3 % of full packets).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

_AT_ONCE = 64 * 1024  # bytes read at once


class Bytes(NamedTuple):
    """What has passed: from the client, and to it."""

    up: int
    down: int

    def since(self, earlier: Bytes) -> Bytes:
        return Bytes(self.up - earlier.up, self.down - earlier.down)


@dataclass
class Connection:
    """One TCP connection of a client, open or over."""

    up: int = 0
    down: int = 0
    is_open: bool = True


@dataclass
class Wire:
    """Listens at `address`, and passes bytes on to `target`; both HOST:PORT."""

    target: str
    address: str = ""
    connections: list[Connection] = field(default_factory=list)

    @property
    def passed(self) -> Bytes:
        """Over all connections so far."""
        return Bytes(sum(one.up for one in self.connections), sum(one.down for one in self.connections))

    def settled(self, seconds: float = 10.0) -> Bytes:
        """What has passed once every connection is over, as soon after its client has ended.

        Raises:
            TimeoutError: one is still open after so many seconds.
        """
        until = time.monotonic() + seconds
        while any(one.is_open for one in self.connections):
            if time.monotonic() > until:
                raise TimeoutError(f"a connection through {self.address} is still open")
            time.sleep(0.02)
        return self.passed


@contextmanager
def counted(target: str) -> Iterator[Wire]:
    """A wire to the coordinator at HOST:PORT, in a thread of its own, while the block runs."""
    wire = Wire(target)
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(wire, ready)), daemon=True)
    thread.start()
    loop, done = ready.result()
    try:
        yield wire
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()


async def _serve(wire: Wire, ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    passing: set[asyncio.Task[None]] = set()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_connect(wire, reader, writer))
        passing.add(task)
        task.add_done_callback(passing.discard)

    done = asyncio.Event()
    try:
        server = await asyncio.start_server(take, "127.0.0.1", 0)
    except OSError as error:
        ready.set_exception(error)
        return
    wire.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    ready.set_result((asyncio.get_running_loop(), done))
    await done.wait()
    server.close()
    for task in passing:
        task.cancel()
    await asyncio.gather(*passing, return_exceptions=True)


async def _connect(wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    connection = Connection()
    wire.connections.append(connection)

    def up(count: int) -> None:
        connection.up += count

    def down(count: int) -> None:
        connection.down += count

    ends = [writer]
    try:
        host, _, port = wire.target.rpartition(":")
        from_there, to_there = await asyncio.open_connection(host, int(port))
        ends.append(to_there)
        await asyncio.gather(_pass(reader, to_there, up), _pass(from_there, writer, down))
    except OSError:
        pass  # nobody is there: the client finds its connection closed, as it would without us
    finally:
        for end in ends:
            end.close()
        connection.is_open = False


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
    """From one end to the other until either closes; then both do."""
    with suppress(OSError):
        while data := await reader.read(_AT_ONCE):
            count(len(data))
            writer.write(data)
            await writer.drain()
    writer.close()
