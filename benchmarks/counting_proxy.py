"""A TCP proxy on 127.0.0.1 that counts bytes: clients connect to it as they would to the server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_AT_ONCE = 1 << 16  # bytes


@dataclass
class Proxy:
    """Bytes that TCP carried, TLS and all: `up` from clients to the server, `down` to them."""

    upstream: str  # HOST:PORT
    address: str = ""
    up: int = 0
    down: int = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.upstream.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:  # nobody is there; the client finds its connection closed
            writer.close()
            return
        try:
            with suppress(asyncio.CancelledError):  # the block is over
                await asyncio.gather(self._pass(reader, far_writer, "up"), self._pass(far_reader, writer, "down"))
        finally:
            writer.transport.abort()
            far_writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):  # either end may be killed
            while data := await reader.read(_AT_ONCE):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


@contextmanager
def counted(upstream: str) -> Iterator[Proxy]:
    """A proxy for the server at HOST:PORT while the block runs, in a thread of its own."""
    proxy = Proxy(upstream)
    listening: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
        proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        over = asyncio.Event()
        listening.set_result((asyncio.get_running_loop(), over))
        await over.wait()
        server.close()  # what is still open ends with the loop

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    loop, over = listening.result(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
