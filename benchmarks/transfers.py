"""One large file in and out of the daemon, beside what bounds it: a bare gRPC stream, and the disk."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import crowd
import grpc
import numpy as np
from crowd import Sendable
from served import JOB, Daemon, Found, Others, daemon, fetched, joined, judged, make_base, rank_for, say

from coordinator.auth import identity
from edge_client.connection.channel import Connection as ClientConnection
from edge_client.connection.remote import Remote
from oneround import stream
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

SPAWN = multiprocessing.get_context("spawn")  # gRPC does not survive a fork


def run(arguments: argparse.Namespace, wanted: Sequence[str]) -> Found:
    """Uploads and downloads of one large file, each repeat beside the raw stream and the disk."""
    base, work = make_base(arguments.work / "base"), arguments.work / "transfers"
    job = {
        "model": {"base": str(base)},
        "lora": {"rank": rank_for(base, arguments.upload_mb, "float32"), "target_modules": ["all-linear"]},
        "round": {"min_clients": 1000, "target_clients": 0, "deadline": "24h"},
        "upload": {"dtype": "float32", "quota": "200GB"},
    }
    with daemon(work / "state", job) as running:
        found = asyncio.run(_transfers(arguments, running, work, wanted))
    shutil.rmtree(work)
    return found


async def _transfers(arguments: argparse.Namespace, running: Daemon, work: Path, wanted: Sequence[str]) -> Found:
    async with running.remote(0) as remote:
        reply = await joined(remote, 0)
        initial = await fetched(remote, reply.job, work / "initial.safetensors")
        (sent,) = crowd.write_adapters(reply.job, initial, work / "adapters", range(1))
        with raw_server(work, sent.size) as (address, certificate):
            async with crowd.channel(address, certificate) as channel:
                raw, scratch = rpc.FederationStub(channel), work / "scratch"
                found: Found = {}
                if "upload" in wanted:
                    out = Upload(remote, sent)
                    found["upload"] = await beside(arguments, running, scratch, out, lambda: raw_upload(raw, out.size))
                if "download" in wanted:
                    into = Download(remote, reply.job, work / "downloaded.safetensors")
                    found["download"] = await beside(arguments, running, scratch, into, lambda: raw_download(raw))
    return found


async def beside(
    arguments: argparse.Namespace, running: Daemon, scratch: Path, ours: Upload | Download, raw: Callable[[], Any]
) -> Found:
    """Our seconds, the raw stream's and the disk's, interleaved so that a slow minute slows all; rates in MB/s.

    A virtual machine's host takes free memory back within seconds, and finding it again for the page cache takes longer
    than writing. So each of the three begins right after a file has been written and dropped.
    """
    runs: list[Found] = []
    others = Others()
    await raw()  # connects, and both ends have seen such a stream
    for _ in range(arguments.repeats):
        synced_write(scratch, 2 * ours.size)
        started = time.perf_counter()
        await raw()
        streamed = time.perf_counter() - started
        synced_write(scratch, 2 * ours.size)
        written = synced_write(scratch, ours.size)
        await ours.prepare()
        synced_write(scratch, 2 * ours.size)
        runs.append({"raw_stream": streamed, "synced_write": written, **await timed(running, ours)})
        say(json.dumps({key: round(value, 3) for key, value in runs[-1].items()}))
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    best = {key: min(run[key] for run in runs) for key in runs[0]}
    return {
        "mb": round(ours.size / 1e6, 1),
        "repeats": len(runs),
        "used_by_others": others.share(),
        "share_of_limit": _share(middle),
        "share_of_limit_of_the_fastest": _share(best),
        "mb_per_second": {key: round(ours.size / 1e6 / middle[key]) for key in ("raw_stream", "synced_write", "ours")},
        "seconds": {key: round(value, 3) for key, value in middle.items()},
        "all_seconds": {key: [round(run[key], 3) for run in runs] for key in runs[0]},
    }


def _share(seconds: Found) -> float:
    return round(float(max(seconds["raw_stream"], seconds["synced_write"]) / seconds["ours"]), 3)


async def timed(running: Daemon, ours: Upload | Download) -> Found:
    used, started, last = running.cpu_seconds(), time.perf_counter(), [0.0]

    def on_bytes(_: int) -> None:
        last[0] = time.perf_counter()

    await ours.run(on_bytes)
    ended, used = time.perf_counter(), running.cpu_seconds() - used
    await ours.settle()
    return {"ours": ended - started, "ours_after_last_chunk": ended - last[0], "daemon_cpu": used}


class Upload:
    """Each run sends a file that the daemon has not seen, as a client that has sent nothing yet."""

    def __init__(self, remote: Remote, sent: Sendable) -> None:
        self._remote, self._sent, self._number, self._lease = remote, sent, 0, ""
        self.size = sent.size

    async def prepare(self) -> None:
        self._number += 1
        there = self._remote.connection
        self._remote = Remote(ClientConnection(there.server, there.channel, there.certificate), crowd.me(self._number))
        self._lease = (await joined(self._remote, self._number)).lease
        self._sent = changed(self._sent.file, self._number)

    async def run(self, on_bytes: Callable[[int], None]) -> None:
        receipt = await self._remote.upload(self._lease, self._sent.declaration, self._sent.file, on_bytes)
        if (receipt.digest, receipt.size) != (self._sent.digest, self._sent.size):
            sys.exit("the receipt is for other bytes")

    async def settle(self) -> None:
        """Looking at what came is not to fall into the next run."""
        await judged(self._remote, self._lease)


class Download:
    """Each run fetches the initial adapter anew."""

    def __init__(self, remote: Remote, job: pb.Job, to: Path) -> None:
        self._remote, self._job, self._to = remote, job, to
        self.size = job.initial.size

    async def prepare(self) -> None:
        self._to.unlink(missing_ok=True)

    async def run(self, on_bytes: Callable[[int], None]) -> None:
        await self._remote.download(JOB, self._job.initial, self._to, on_bytes)

    async def settle(self) -> None:
        pass


def changed(file: Path, number: int) -> Sendable:
    """The file with another last value, so another digest; synced and in the page cache."""
    with file.open("rb+") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(np.float32(number / 1000).tobytes())
        os.fsync(opened.fileno())
    return crowd.describe(file)


def synced_write(file: Path, size: int) -> float:
    """Seconds to write so many bytes, synced."""
    data = memoryview(os.urandom(stream.chunk_bytes(size)))
    started = time.perf_counter()
    with file.open("wb") as opened:
        for _ in range(size // len(data)):
            opened.write(data)
        opened.write(data[: size % len(data)])
        opened.flush()
        os.fsync(opened.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return seconds


# ---- the raw stream: the same messages and TLS, nothing kept ----


class Raw(rpc.FederationServicer):
    """Takes what comes and forgets it; sends as many bytes as a file would have."""

    def __init__(self, size: int) -> None:
        self._size = size

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: Any) -> pb.Receipt:
        size = 0
        async for message in request_iterator:
            size += len(message.data)
        return pb.Receipt(size=size)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        for data in pieces(self._size):
            yield pb.Chunk(data=data)


def pieces(size: int) -> Iterator[bytes]:
    """Chunks as a file of this size gives them, from memory."""
    data = os.urandom(stream.chunk_bytes(size))
    for _ in range(size // len(data)):
        yield data
    if size % len(data):
        yield data[: size % len(data)]


async def raw_upload(stub: Any, size: int) -> None:
    async def messages() -> AsyncIterator[pb.UploadRequest]:
        for data in pieces(size):
            yield pb.UploadRequest(data=data)

    assert (await stub.Upload(messages())).size == size


async def raw_download(stub: Any) -> None:
    async for _ in stub.Download(pb.DownloadRequest()):
        pass


@contextmanager
def raw_server(work: Path, size: int) -> Iterator[tuple[str, bytes]]:
    """The raw stream's other end, in a process of its own; gives its address and certificate."""
    ours, theirs = SPAWN.Pipe(duplex=False)
    server = SPAWN.Process(target=serve_raw, args=(work / "raw", size, theirs), daemon=True)
    server.start()
    try:
        yield ours.recv(), identity.load_or_create(work / "raw").certificate
    finally:
        server.terminate()
        server.join()


def serve_raw(folder: Path, size: int, address: Connection) -> None:
    async def serve() -> None:
        who = identity.load_or_create(folder)
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES)])
        rpc.add_FederationServicer_to_server(Raw(size), server)
        credentials = grpc.ssl_server_credentials([(who.key, who.certificate)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        address.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())
