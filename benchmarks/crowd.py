"""Simulated clients: many in a process, each with a connection of its own, a heartbeat, and one adapter to send.

They speak through `edge_client.connection.remote`, so what is measured is the client's real side of the wire. Adapters
lie on the disk before anything is timed, each with its own digest, and are sound: the job's layout and base, A as
announced, B a common direction with noise of the client's own.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from converters import adapter
from converters.adapter import Adapter, LowRank
from edge_client.connection.channel import Connection as ClientConnection
from edge_client.connection.identity import ClientKey
from edge_client.connection.remote import Remote
from oneround import stream, tls
from oneround.errors import OneroundError, Unreachable
from oneround.v1 import federation_pb2 as pb

PATIENCE = 600.0  # seconds until a client that gets no receipt gives up, and a process that waits for others
LONGEST_PAUSE = 60.0  # seconds between two tries to send, as in edge_client
_OPTIONS = [
    ("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.ssl_target_name_override", tls.NAME),
    ("grpc.use_local_subchannel_pool", 1),  # otherwise channels to one address share one TCP connection
]


@dataclass(frozen=True)
class Sendable:
    """An adapter on the disk, and what its client declares of it."""

    file: Path
    digest: str
    size: int

    @property
    def declaration(self) -> pb.Declaration:
        return pb.Declaration(digest=self.digest, size=self.size, num_examples=80, num_tokens=10_000, steps=30)


def write_adapters(job: pb.Job, initial: Path, folder: Path, numbers: range) -> list[Sendable]:
    """One adapter per number, in the job's layout and dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    start = adapter.read(initial)
    common = _noise(start, seed=0)
    made = []
    for number in numbers:
        own = _noise(start, seed=number + 1)
        modules = {
            name: LowRank(factors.a, (common[name] + own[name]) * np.float32(0.01))
            for name, factors in start.modules.items()
        }
        file = folder / f"{number}.safetensors"
        metadata = {"base": job.base_fingerprint, "tokenizer": job.tokenizer, "chat_template": job.chat_template}
        adapter.write(Adapter(modules, metadata), file, job.spec.upload.dtype)
        made.append(describe(file))
    return made


def describe(file: Path) -> Sendable:
    return Sendable(file, stream.digest(file), file.stat().st_size)


def _noise(start: Adapter, seed: int) -> dict[str, adapter.Factor]:
    """For each module a random matrix of B's shape (out, r)."""
    rng = np.random.default_rng(seed)
    shapes = {name: (factors.shape.out, factors.rank) for name, factors in start.modules.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def channel(address: str, certificate: bytes) -> grpc.aio.Channel:
    """A TLS connection that no other channel shares."""
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
    return grpc.aio.secure_channel(address, credentials, _OPTIONS)


def me(number: int) -> ClientKey:
    """A client's key; the same number always has the same one."""
    return ClientKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"client {number}".encode()).digest()))


def client_name(number: int) -> str:
    return f"c{number}"


# ---- one process of clients ----


@dataclass(frozen=True)
class Plan:
    """What one process of clients does."""

    address: str
    certificate: bytes
    job: str
    sendables: dict[int, Sendable]  # by the client's number
    join_seconds: float  # clients arrive at random within this time
    send_seconds: float  # and begin to send within this
    beat_seconds: float


@dataclass
class Tally:
    """What happened to the clients of a process. Times are on the machine's monotonic clock, latencies in ms."""

    joins: list[float] = field(default_factory=list)
    beats: list[tuple[float, float]] = field(default_factory=list)  # when sent, latency
    streams: list[tuple[float, float]] = field(default_factory=list)  # first chunk sent, receipt held
    lags: list[float] = field(default_factory=list)  # how late this process's own event loop ran a timer
    receipts: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.joins += other.joins
        self.beats += other.beats
        self.streams += other.streams
        self.lags += other.lags
        self.receipts += other.receipts
        self.retried += other.retried
        self.failed += other.failed


def process(plan: Plan, together: Barrier, report: Connection) -> None:
    """The whole life of one process of clients; meets the others, and the benchmark, before and after sending."""
    try:
        report.send(asyncio.run(_live(plan, together)))
    except BaseException:
        together.abort()
        raise


async def _live(plan: Plan, together: Barrier) -> Tally:
    tally = Tally()
    clients = [Client(number, plan, tally) for number in plan.sendables]
    pulses = [asyncio.create_task(lag(tally.lags))]
    try:
        await asyncio.gather(*(client.arrive(pulses) for client in clients))
        await asyncio.to_thread(together.wait, PATIENCE)
        await asyncio.gather(*(client.send() for client in clients))
        await asyncio.to_thread(together.wait, PATIENCE)
    finally:
        for heartbeat in pulses:
            heartbeat.cancel()
        await asyncio.gather(*pulses, return_exceptions=True)
        await asyncio.gather(*(client.leave() for client in clients))
    return tally


class Client:
    """One client, from its arrival to its receipt."""

    def __init__(self, number: int, plan: Plan, tally: Tally) -> None:
        self._number, self._plan, self._tally = number, plan, tally
        self._channel: grpc.aio.Channel | None = None
        self._lease = ""

    async def arrive(self, pulses: list[asyncio.Task[None]]) -> None:
        """Connect, sign in and join at some time; the heartbeat begins."""
        await asyncio.sleep(random.uniform(0, self._plan.join_seconds))
        started = time.monotonic()
        self._channel = channel(self._plan.address, self._plan.certificate)
        connection = ClientConnection(self._plan.address, self._channel, self._plan.certificate)
        self._remote = Remote(connection, me(self._number))
        self._lease = (await self._joined()).lease
        self._tally.joins.append(1e3 * (time.monotonic() - started))
        beats = beat(self._remote, self._lease, self._plan.beat_seconds, self._tally)
        pulses.append(asyncio.create_task(beats))

    async def _joined(self) -> pb.JoinReply:
        request = pb.JoinRequest(job=self._plan.job, client_name=client_name(self._number))
        while True:
            try:
                return await self._remote.join(request)
            except Unreachable as error:
                self._tally.retried[f"join: {str(error)[:120]}"] += 1
                await asyncio.sleep(random.uniform(0.5, 1.5))

    async def send(self) -> None:
        """Upload until there is a receipt; breaks are resumed, as edge_client does."""
        await asyncio.sleep(random.uniform(0, self._plan.send_seconds))
        pause, ends = 1.0, time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            try:
                return await self._upload()
            except Unreachable as error:
                self._tally.retried[f"upload: {str(error)[:120]}"] += 1
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE)
            except OneroundError as error:
                self._tally.failed.append(str(error))
                return None
        self._tally.failed.append("no receipt in time")
        return None

    async def _upload(self) -> None:
        mine = self._plan.sendables[self._number]
        began: list[float] = []

        def on_bytes(_: int) -> None:
            if not began:
                began.append(time.monotonic())

        receipt = await self._remote.upload(self._lease, mine.declaration, mine.file, on_bytes)
        if receipt.digest != mine.digest:
            self._tally.failed.append("the receipt is for other bytes")
            return
        self._tally.receipts += 1
        if began:
            self._tally.streams.append((began[0], time.monotonic()))

    async def leave(self) -> None:
        if self._channel is not None:
            await self._channel.close()


async def beat(remote: Remote, lease: str, seconds: float, tally: Tally) -> None:
    """Heartbeats until cancelled, each with its latency."""
    now = pb.HeartbeatRequest(lease=lease, total_steps=1000, loss=2.5, tokens_per_second=1000.0)
    pause = seconds
    await asyncio.sleep(random.uniform(0, seconds))
    while True:
        now.step += 1
        started = time.monotonic()
        try:
            answer = await remote.heartbeat(now)
            pause = max(seconds, answer.next_seconds)  # as edge_client does
            tally.beats.append((started, 1e3 * (time.monotonic() - started)))
        except OneroundError as error:
            tally.retried[f"heartbeat: {str(error)[:120]}"] += 1
        await asyncio.sleep(max(0.0, started + pause - time.monotonic()))


async def lag(lags: list[float]) -> None:
    """How late timers fire in this process: what of a latency is the simulation's own."""
    while True:
        due = time.monotonic() + 0.05
        await asyncio.sleep(0.05)
        lags.append(1e3 * (time.monotonic() - due))
