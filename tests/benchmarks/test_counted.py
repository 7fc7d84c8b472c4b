"""The counting wire between real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from benchmarks.counted import Bytes, counted


@pytest.fixture
def triples() -> Iterator[str]:
    """A server that reads until its client is done, answers with three times as much, and hangs up; HOST:PORT."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                taken, _ = listening.accept()
            except OSError:
                return
            with taken:
                size = int.from_bytes(taken.recv(8, socket.MSG_WAITALL), "big")
                got = taken.recv(size, socket.MSG_WAITALL)
                taken.sendall(3 * got)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


def ask(address: str, size: int) -> bytes:
    host, _, port = address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=300)) as connection:
        connection.sendall(size.to_bytes(8, "big") + bytes(size))
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def test_every_byte_is_counted_by_way_and_by_connection(triples: str) -> None:
    with counted(triples) as wire:
        for size in (0, 1, 1_000_003):
            assert ask(wire.address, size) == bytes(3 * size)
        assert wire.settled() == Bytes(3 * 8 + 1_000_004, 3 * 1_000_004)
        assert [(one.up, one.down) for one in wire.connections] == [(8, 0), (9, 3), (1_000_011, 3_000_009)]
        before = wire.passed
        ask(wire.address, 10)
        assert wire.settled().since(before) == Bytes(18, 30)


def test_where_nobody_is_the_client_finds_its_connection_closed() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        free = f"127.0.0.1:{nobody.getsockname()[1]}"
    with counted(free) as wire:
        host, _, port = wire.address.rpartition(":")
        with closing(socket.create_connection((host, int(port)), timeout=300)) as connection:
            assert connection.recv(1) == b""
        assert wire.settled() == Bytes(0, 0)


def test_what_is_still_open_is_not_taken_for_all_there_is(triples: str) -> None:
    with counted(triples) as wire:
        host, _, port = wire.address.rpartition(":")
        with closing(socket.create_connection((host, int(port)), timeout=300)) as connection:
            connection.sendall(bytes([0]))
            while not wire.passed.up:
                pass
            with pytest.raises(TimeoutError, match="still open"):
                wire.settled(seconds=0.1)
