"""Networks for tests: one that can be cut, as Wi-Fi is, and lead to another daemon; and two machines on a cable."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest


class Relay:
    """Listens on one address for good, and passes bytes on to wherever the daemon listens now."""

    def __init__(self) -> None:
        self.target = ""  # HOST:PORT; empty: nobody is there
        self.address = ""
        self.up, self.down = 0, 0  # bytes passed on: from the client, and to it
        self.broken = asyncio.Event()
        self.cut_at_up: list[int] = []  # where each break comes, by the bytes that have passed
        self.cut_at_down: list[int] = []
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Every connection breaks."""
        self.broken.set()
        for writer in self._open:
            writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with suppress(OSError, ValueError):
            host, _, port = self.target.rpartition(":")
            there, further = await asyncio.open_connection(host, int(port))
            self._open.add(further)
            await asyncio.gather(self._pass(reader, further, up=True), self._pass(there, writer, up=False))
        for each in (writer, *self._open):
            if each.transport.is_closing():
                self._open.discard(each)
        writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(16 * 1024):
                writer.write(data)
                await writer.drain()
                self.up, self.down = self.up + up * len(data), self.down + (not up) * len(data)
                due, passed = (self.cut_at_up, self.up) if up else (self.cut_at_down, self.down)
                if due and passed > due[0]:
                    due.pop(0)
                    self.cut()
        writer.transport.abort()


def ip(*arguments: str) -> None:
    """The system's own command for networks."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces on one cable, with 10.77.0.1 and 10.77.0.2, and IPv6 beside."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("making network namespaces takes root, and ip")
    names = f"oneround-a{os.getpid()}", f"oneround-b{os.getpid()}"
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "lan0", "netns", names[0], "type", "veth", "peer", "name", "lan0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets nobody make network namespaces: {error.stderr}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "lan0")
            ip("-n", name, "addr", "add", f"fd77::{number}/64", "dev", "lan0", "nodad")
            for device in ("lo", "lan0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
