"""`coordinator serve` in a process of its own, over a fresh folder: what it is given to serve, and what it costs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crowd
import ml_dtypes
import numpy as np
import psutil
from bench_publish import SHAPE

from converters import adapter, architectures, tensors
from converters.tensors import Later
from edge_client.connection.channel import Connection
from edge_client.connection.remote import Remote
from oneround.v1 import federation_pb2 as pb

ROOT = Path(__file__).parent
SERVE = [str(Path(sys.executable).with_name("coordinator")), "serve", "--listen", "127.0.0.1:0", "--no-advertise"]
JOB = "bench"
Found = dict[str, Any]


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
    async def remote(self, number: int) -> AsyncIterator[Remote]:
        """The connection of one client."""
        async with crowd.channel(self.address, self.certificate) as channel:
            yield Remote(Connection(self.address, channel, self.certificate), crowd.me(number))


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
    """Of the client that the connection is of."""
    return await remote.join(pb.JoinRequest(job=JOB, client_name=crowd.client_name(number)))


async def fetched(remote: Remote, job: pb.Job, to: Path) -> Path:
    """The initial adapter."""
    await remote.download(job.spec.name, job.initial, to, lambda _: None)
    return to


async def judged(remote: Remote, lease: str) -> None:
    """Returns when the daemon has looked at this client's contribution."""
    for _ in range(1200):
        answer = await remote.heartbeat(pb.HeartbeatRequest(lease=lease))
        if answer.HasField("judgement") and answer.judgement.verdict != pb.VERDICT_PENDING:
            if answer.judgement.verdict == pb.VERDICT_QUARANTINED:
                sys.exit(f"a contribution of ours is set aside: {answer.judgement.reason}")
            return
        await asyncio.sleep(0.1)
    say("a contribution is not judged after two minutes")


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


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
