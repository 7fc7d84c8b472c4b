"""How many clients one daemon carries, how fast one contribution gets in and out, and what never waits for what.

Everything runs against `coordinator serve` as it is, in a process of its own, with TLS, over loopback:

- crowd: simulated clients in several processes, each with a TCP connection of its own, join, beat every two seconds,
  and all begin to send at the same moment. Lost is whoever's digest the daemon does not show in the end. Memory is the
  daemon's largest resident set, above what it was after one client had joined and sent; again with a tenth of the
  clients, and with adapters four times the size: both must make no difference.
- upload, download: one large file, from the client's disk to the receipt, and from the daemon to the client's disk,
  synced and digest-checked. Beside each repeat, what bounds it: a bare gRPC stream of the same messages and TLS between
  two processes, where nobody keeps anything; and writing as many bytes to the same disk, synced.
- publishing: heartbeats while the daemon publishes a 1.1B model, quantised and verified, beside those of an idle one.

Clients share the processors with the daemon, so latencies are upper bounds; `client_lag_p99_ms` says how late the
simulation's own timers fired, `used_by_others` what share of the processors went to work that is not this benchmark's.

    python benchmarks/bench_coordinator.py --work build/bench --json build/bench/coordinator.json   # 20 GB, 15 minutes

Prints one JSON document last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import crowd
import grpc
import ml_dtypes
import numpy as np
import psutil
from bench_publish import SHAPE
from crowd import Plan, Sendable, Tally

from converters import adapter, architectures, tensors
from converters.tensors import Later
from coordinator import control, identity
from edge_client.remote import Remote
from oneround import stream
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

ROOT = Path(__file__).parent
SERVE = [str(Path(sys.executable).with_name("coordinator")), "serve", "--listen", "127.0.0.1:0"]
JOB = "bench"
BEAT_SECONDS = 2.0  # as edge_client does
SPAWN = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
Found = dict[str, Any]


# ---- the daemon ----


@dataclass(frozen=True)
class Daemon:
    """A daemon that runs."""

    state: Path
    pid: int
    address: str
    certificate: bytes

    def cpu_seconds(self) -> float:
        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)

    @asynccontextmanager
    async def remote(self) -> AsyncIterator[Remote]:
        async with crowd.channel(self.address, self.certificate) as channel:
            yield Remote(self.address, channel)


@contextmanager
def daemon(state: Path, job: dict[str, dict[str, Any]]) -> Iterator[Daemon]:
    """`coordinator serve` over a fresh folder with one job open; stopped in the end."""
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    file = state.with_suffix(".toml")
    file.write_text(_toml(job))
    with state.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([*SERVE, "--state", str(state), "--job", str(file)], stdout=log, stderr=log)
        try:
            while not (state / "daemon.json").exists():
                if process.poll() is not None:
                    sys.exit(f"the coordinator did not start; see {log.name}")
                time.sleep(0.1)
            address = json.loads((state / "daemon.json").read_text())["address"]
            yield Daemon(state, process.pid, address, (state / "certificate.pem").read_bytes())
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _toml(job: dict[str, dict[str, Any]]) -> str:
    lines = [f'name = "{JOB}"']
    for table, keys in job.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


class Memory:
    """The largest resident set of a process from now on, and of its children together, in MB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        with suppress(OSError):  # Linux keeps the peak itself, and lets it start anew
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self.idle = self.peak = self.now()
        self.children = 0.0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def now(self) -> float:
        return float(self._process.memory_info().rss / 1e6)

    def stop(self) -> Found:
        self._over.set()
        self._sampler.join()
        with suppress(OSError):
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            self.peak = max(self.peak, int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)
        return {
            "idle_mb": round(self.idle, 1),
            "peak_mb": round(self.peak, 1),
            "growth_mb": round(self.peak - self.idle, 1),
            "children_peak_mb": round(self.children, 1),
        }

    def _sample(self) -> None:
        while not self._over.wait(0.25):
            self.peak = max(self.peak, self.now())
            together = 0.0
            for child in self._process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    together += child.memory_info().rss / 1e6
            self.children = max(self.children, together)


class Others:
    """What share of the processors' time, from now on, went to anything but this benchmark: a figure's trouble."""

    def __init__(self) -> None:
        self._started, self._busy, self._ours = time.monotonic(), _busy_seconds(), _our_seconds()

    def share(self) -> float:
        whole = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        return round((_busy_seconds() - self._busy - (_our_seconds() - self._ours)) / whole, 3)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _our_seconds() -> float:
    """Of this process and everything that it started, ended or not."""
    used = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            used += sum(process.cpu_times()[:4])  # user and system, its own and its ended children's
    return used


# ---- what is worked on ----


def make_base(folder: Path) -> Path:
    """A checkpoint of TinyLlama-1.1B's shape in bfloat16; random weights, since time does not depend on them."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config | SHAPE))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "base" / name, folder / name)
    tensors.write(folder / "model.safetensors", dict(_weights()), {"format": "pt"})
    return folder


def _weights() -> Iterator[tuple[str, Later]]:
    hidden, inner, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    narrow = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)

    def matrix(out: int, into: int) -> Later:
        return Later(dtype, (out, into), lambda: (rng.standard_normal((out, into), np.float32) * 0.02).astype(dtype))

    def norm() -> Later:
        return Later(dtype, (hidden,), lambda: np.ones(hidden, dtype))

    yield "model.embed_tokens.weight", matrix(vocabulary, hidden)
    yield "lm_head.weight", matrix(vocabulary, hidden)
    yield "model.norm.weight", norm()
    for layer in range(SHAPE["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, out in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{block}.self_attn.{name}_proj.weight", matrix(out, hidden)
        yield f"{block}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{block}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{block}.mlp.down_proj.weight", matrix(hidden, inner)
        yield f"{block}.input_layernorm.weight", norm()
        yield f"{block}.post_attention_layernorm.weight", norm()


def rank_for(base: Path, megabytes: float, dtype: str) -> int:
    """The rank at which an adapter of all linear layers has about this size."""
    each = sum(out + into for out, into in architectures.describe(base).linears.values())
    return max(1, round(megabytes * 1e6 / (each * adapter.WIRE_DTYPES[dtype].itemsize)))


async def joined(remote: Remote, number: int) -> pb.JoinReply:
    request = pb.JoinRequest(job=JOB, client_id=crowd.client_id(number), client_name=crowd.client_name(number))
    return await remote.join(request)


async def fetched(remote: Remote, job: pb.Job, to: Path) -> Path:
    """The initial adapter."""
    await remote.download(job.spec.name, job.initial, to, lambda _: None)
    return to


# ---- a crowd ----


def run_crowd(arguments: argparse.Namespace) -> Found:
    """The crowd; a tenth of it; and all of it with four times the adapter."""
    clients, size = arguments.clients, arguments.adapter_mb
    whole = one_crowd(arguments, clients, size)
    flat = [one_crowd(arguments, max(1, clients // 10), size), whole, one_crowd(arguments, clients, 4 * size)]
    shown = ("clients", "adapter_mb", "lost", "growth_mb", "growth_when_joined_mb", "children_peak_mb")
    return {**whole, "flat": [{key: run[key] for key in shown} for run in flat]}


def one_crowd(arguments: argparse.Namespace, clients: int, megabytes: float) -> Found:
    base, work = ROOT / "base", arguments.work / "crowd"
    job = {
        "model": {"base": str(base)},
        "lora": {"rank": rank_for(base, megabytes, "bfloat16"), "target_modules": ["all-linear"]},
        "round": {"min_clients": clients + 1, "target_clients": 0, "deadline": "24h", "max_clients": clients + 1},
        "upload": {"dtype": "bfloat16", "quota": "200GB"},
    }
    _say(f"crowd of {clients}, {megabytes} MB each")
    with daemon(work / "state", job) as running:
        sendables = asyncio.run(_warm_up(running, clients, work))
        memory, others = Memory(running.pid), Others()
        tally, phases = _together(arguments, running, sendables, memory)
        phases["used_by_others"] = others.share()
        shown, judging = asyncio.run(_all_judged(running))
        found = {
            "clients": clients,
            "adapter_mb": round(sendables[0].size / 1e6, 2),
            "lost": _lost(shown, sendables),
            "receipts": tally.receipts,
            **_verdicts(shown),
            **_figures(tally, phases, sendables[0].size),
            "seconds_until_all_judged": judging,
            **phases,
            **memory.stop(),
        }
    shutil.rmtree(work)
    _say(json.dumps(found))
    return found


async def _warm_up(running: Daemon, clients: int, work: Path) -> list[Sendable]:
    """Everybody's adapter; and one client more has joined and sent, so that idle memory has seen everything once."""
    async with running.remote() as remote:
        reply = await joined(remote, clients)
        initial = await fetched(remote, reply.job, work / "initial.safetensors")
        sendables = crowd.write_adapters(reply.job, initial, work / "adapters", range(clients + 1))
        last = sendables.pop()
        await remote.upload(reply.lease, last.declaration, last.file, lambda _: None)
        await judged(remote, reply.lease)
        return sendables


def _together(
    arguments: argparse.Namespace, running: Daemon, sendables: list[Sendable], memory: Memory
) -> tuple[Tally, Found]:
    """All processes of clients from their start to the last receipt."""
    together = SPAWN.Barrier(arguments.processes + 1)
    reports: list[Connection] = []
    workers = []
    for nth in range(arguments.processes):
        mine = {number: sendables[number] for number in range(nth, len(sendables), arguments.processes)}
        plan = Plan(
            running.address,
            running.certificate,
            JOB,
            mine,
            arguments.join_seconds,
            arguments.send_seconds,
            BEAT_SECONDS,
        )
        report, theirs = SPAWN.Pipe(duplex=False)
        workers.append(SPAWN.Process(target=crowd.process, args=(plan, together, theirs), daemon=True))
        workers[-1].start()
        theirs.close()
        reports.append(report)
    started, used = time.monotonic(), running.cpu_seconds()
    together.wait(crowd.PATIENCE)
    sending, growth, used_joining = time.monotonic(), memory.now() - memory.idle, running.cpu_seconds() - used
    together.wait(crowd.PATIENCE)
    phases = {
        "began_sending": sending,
        "seconds_joining": round(sending - started, 2),
        "seconds_sending": round(time.monotonic() - sending, 2),
        "daemon_cpu_seconds_joining": round(used_joining, 2),
        "daemon_cpu_seconds_sending": round(running.cpu_seconds() - used - used_joining, 2),
        "growth_when_joined_mb": round(growth, 1),
    }
    tally = Tally()
    for report, worker in zip(reports, workers, strict=True):
        tally.add(report.recv())
        worker.join()
    return tally, phases


def _figures(tally: Tally, phases: Found, size: int) -> Found:
    sending = phases.pop("began_sending")
    wall = phases["seconds_sending"]
    return {
        **latencies("heartbeat", [ms for _, ms in tally.beats]),
        "heartbeat_p99_ms_joining": percentile([ms for at, ms in tally.beats if at < sending], 0.99),
        "heartbeat_p99_ms_sending": percentile([ms for at, ms in tally.beats if at >= sending], 0.99),
        **latencies("join", tally.joins),
        "client_lag_p99_ms": percentile(tally.lags, 0.99),
        "uploads_open_at_once": most_at_once(tally.streams),
        "uploads_per_second": round(tally.receipts / wall, 1),
        "mb_per_second": round(tally.receipts * size / 1e6 / wall, 1),
        "retried": dict(tally.retried),
        "failed": tally.failed[:10],
    }


async def _all_judged(running: Daemon) -> tuple[pb.JobStatus, float]:
    """What the daemon shows once it has looked at everything, and how long after the last receipt that was."""
    started = time.monotonic()
    while True:
        shown = await control.show(running.state, JOB)
        seconds = round(time.monotonic() - started, 1)
        if not _verdicts(shown)["pending"] or seconds > crowd.PATIENCE:
            return shown, seconds
        await asyncio.sleep(1.0)


def _lost(shown: pb.JobStatus, sendables: list[Sendable]) -> int:
    there = {client.name: client.contribution.declaration.digest for client in shown.clients}
    return sum(there.get(crowd.client_name(number)) != sent.digest for number, sent in enumerate(sendables))


def _verdicts(shown: pb.JobStatus) -> Found:
    """How many contributions stand where; the warm-up's is among them."""
    verdicts = [client.contribution.judgement.verdict for client in shown.clients if client.HasField("contribution")]
    names = {name: getattr(pb, f"VERDICT_{name.upper()}") for name in ("admitted", "clipped", "quarantined")}
    counted = {name: verdicts.count(value) for name, value in names.items()}
    return {**counted, "pending": len(verdicts) - sum(counted.values())}


# ---- one large file, in and out ----


def run_transfers(arguments: argparse.Namespace, wanted: Sequence[str]) -> Found:
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
    async with running.remote() as remote:
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
        _say(json.dumps({key: round(value, 3) for key, value in runs[-1].items()}))
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


async def judged(remote: Remote, lease: str) -> None:
    """Returns when the daemon has looked at this client's contribution."""
    for _ in range(1200):
        answer = await remote.heartbeat(pb.HeartbeatRequest(lease=lease))
        if answer.HasField("judgement") and answer.judgement.verdict != pb.VERDICT_PENDING:
            if answer.judgement.verdict == pb.VERDICT_QUARANTINED:
                sys.exit(f"a contribution of ours is set aside: {answer.judgement.reason}")
            return
        await asyncio.sleep(0.1)
    _say("a contribution is not judged after two minutes")


def synced_write(file: Path, size: int) -> float:
    """Seconds to write so many bytes, synced."""
    data = memoryview(os.urandom(stream.CHUNK_BYTES))
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
    data = os.urandom(stream.CHUNK_BYTES)
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


# ---- heartbeats while a model is published ----


def run_publishing(arguments: argparse.Namespace) -> Found:
    base, work = make_base(arguments.work / "base"), arguments.work / "publishing"
    job = {
        "model": {"base": str(base)},
        "lora": {"rank": 16, "target_modules": ["all-linear"]},
        "round": {"min_clients": 3, "target_clients": 3, "deadline": "24h"},
        "upload": {"dtype": "bfloat16"},
        "publish": {"gguf": ["bf16", "q8_0", "q4_k_m"]},
    }
    with daemon(work / "state", job) as running:
        found = asyncio.run(_publishing(running, work))
    shutil.rmtree(work)
    _say(json.dumps(found))
    return found


async def _publishing(running: Daemon, work: Path) -> Found:
    """Ten clients beat ten times a second: first for nothing else, then while what three of them sent is published."""
    tally = Tally()
    async with running.remote() as remote:
        first = await joined(remote, 0)
        initial = await fetched(remote, first.job, work / "initial.safetensors")
        sendables = crowd.write_adapters(first.job, initial, work / "adapters", range(3))
        channels = [crowd.channel(running.address, running.certificate) for _ in range(10)]
        remotes = [Remote(running.address, channel) for channel in channels]
        leases = [(await joined(each, number)).lease for number, each in enumerate(remotes)]
        pulses = [asyncio.create_task(crowd.lag(tally.lags))]
        for each, lease in zip(remotes, leases, strict=True):
            pulses.append(asyncio.create_task(crowd.beat(each, lease, 0.1, tally)))
        await asyncio.sleep(15)
        idle = [ms for _, ms in tally.beats]
        memory, others, used = Memory(running.pid), Others(), running.cpu_seconds()
        for each, lease, sent in zip(remotes, leases, sendables, strict=False):
            await each.upload(lease, sent.declaration, sent.file, lambda _: None)
        stages, state, reason = await _stages(remote)
        used, elsewhere = running.cpu_seconds() - used, others.share()
        for pulse in pulses:
            pulse.cancel()
        await asyncio.gather(*pulses, return_exceptions=True)
        for channel in channels:
            await channel.close()
    began, ended = stages[0][0], stages[-1][0]
    during = [ms for at, ms in tally.beats if began <= at <= ended]
    return {
        **latencies("heartbeat", during),
        "heartbeats": len(during),
        "heartbeat_p99_ms_idle": percentile(idle, 0.99),
        "client_lag_p99_ms": percentile(tally.lags, 0.99),
        "seconds": round(ended - began, 1),
        "daemon_cpu_seconds": round(used, 2),
        "used_by_others": elsewhere,
        "by_stage": _by_stage(stages, tally.beats),
        "state": state,
        "reason": reason,
        "retried": dict(tally.retried),
        **memory.stop(),
    }


async def _stages(remote: Remote) -> tuple[list[tuple[float, str]], str, str]:
    """When each stage began, the end last; and where the job stands then."""
    seen: list[tuple[float, str]] = []
    async for status in remote.watch(JOB):
        now = time.monotonic()
        if status.state == pb.STATE_PUBLISHING and (not seen or seen[-1][1] != status.stage):
            seen.append((now, status.stage))
        if status.state in (pb.STATE_PUBLISHED, pb.STATE_FAILED):
            return [*seen, (now, "end")], pb.State.Name(status.state), status.reason
    sys.exit("the daemon stopped telling")


def _by_stage(stages: list[tuple[float, str]], beats: list[tuple[float, float]]) -> list[Found]:
    found = []
    for (began, name), (ended, _) in itertools.pairwise(stages):
        during = [ms for at, ms in beats if began <= at < ended]
        found.append({"stage": name, "seconds": round(ended - began, 1), "p99_ms": percentile(during, 0.99)})
    return found


# ---- figures ----


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return round(ordered[math.ceil(share * len(ordered)) - 1], 2) if ordered else None


def latencies(name: str, values: Sequence[float]) -> Found:
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{name}_{key}_ms": percentile(values, share) for key, share in shares.items()}


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """How many spans overlapped at most."""
    events = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def machine() -> Found:
    packages = ("grpcio", "protobuf", "sqlalchemy", "numpy")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


SECTIONS = ("crowd", "upload", "download", "publishing")


def run(arguments: argparse.Namespace) -> Found:
    found: Found = {"benchmark": "coordinator", "machine": machine()}
    wanted = arguments.only.split(",")
    if "crowd" in wanted:
        found["crowd"] = whole = run_crowd(arguments)
        found |= {key: whole[key] for key in ("clients", "lost", "heartbeat_p99_ms", "join_p99_ms")}
        found["peak_rss_growth_mb"] = whole["growth_mb"]
    if {"upload", "download"} & set(wanted):
        for name, one in run_transfers(arguments, wanted).items():
            found |= {name: one, f"{name}_share_of_limit": one["share_of_limit"]}
    if "publishing" in wanted:
        found["publishing"] = run_publishing(arguments)
        found["heartbeat_p99_ms_while_publishing"] = found["publishing"]["heartbeat_p99_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="a folder for some 20 GB")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--adapter-mb", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=4, help="processes that the crowd is spread over")
    parser.add_argument("--join-seconds", type=float, default=15.0, help="the time within which the crowd arrives")
    parser.add_argument("--send-seconds", type=float, default=5.0, help="the time within which it begins to send")
    parser.add_argument("--upload-mb", type=float, default=512.0)
    parser.add_argument("--repeats", type=int, default=5, help="of upload and download")
    parser.add_argument("--json", type=Path, help="also write the document there")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(SECTIONS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; --only takes {', '.join(SECTIONS)}")
    arguments.work = arguments.work.resolve()
    document = json.dumps(run(arguments), indent=2)
    if arguments.json:
        arguments.json.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
