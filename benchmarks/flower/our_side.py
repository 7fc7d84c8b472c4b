"""Our side of against_flower.py: `coordinator serve` with TLS, and an `edge-client join` per client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cohort import run, tool
from served import JOB, Daemon, daemon

from converters import architectures
from converters.gguf import adapter as gguf_adapter

from .both_sides import Found, Step, Task, end

SAVE_EVERY = 10.0  # seconds between two snapshots of a client's training; 30 by default


@contextmanager
def coordinator(task: Task, out: Path, dtype: str = "bfloat16") -> Iterator[Oneround]:
    job = {
        "model": {"base": str(task.base)},
        "lora": {"rank": task.rank, "alpha": task.alpha},
        "train": {
            "epochs": task.epochs,
            "learning_rate": task.learning_rate,
            "schedule": "linear",
            "batch_size": task.batch_size,
            "max_seq_len": task.sequence,
            "seed": task.seed,
        },
        "round": {
            "min_clients": task.quorum,
            "target_clients": len(task.clients),
            "deadline": f"{task.timeout:.0f}s",
            "grace": f"{task.grace:.0f}s",
        },
        "upload": {"dtype": dtype},
        "aggregate": {"method": "exact"},
        "publish": {"gguf": ["f16"]},
    }
    with daemon(out / "coordinator", job) as server:
        side = Oneround(task, out, server)
        try:
            yield side
        finally:
            for client in side.clients.values():
                end(client.process.pid)


class Oneround:
    """A coordinator, and who joined it."""

    def __init__(self, task: Task, out: Path, server: Daemon) -> None:
        self._task, self._out = task, out
        self.pid, self.address = server.pid, server.address
        self.clients: dict[str, Joined] = {}

    def join(self, client: str, address: str) -> int:
        before = self.clients.get(client)
        self.clients[client] = Joined(self._task, self._out, client, address, before.steps if before else [])
        return self.clients[client].process.pid

    def begin(self) -> None:
        pass

    def steps(self, client: str) -> Sequence[Step]:
        return self.clients[client].steps

    def finished(self) -> float | None:
        seen = [client.published for client in self.clients.values() if client.published]
        for client in self.clients.values():
            if (client.process.poll() or 0) > 0:  # below: it was killed
                sys.exit(f"a client failed; see {client.log}")
        return min(seen, default=None)

    def result(self) -> Found:
        to = self._out / "published"
        where = ("--server", self.address, "--state", self._out / "puller")
        run("edge-client", "pull", JOB, "--artifact", "all", "--to", to, *where)
        manifest = json.loads((to / "manifest.json").read_text())
        return {
            "adapter": gguf_adapter.read(to / "adapter.gguf", architectures.describe(self._task.base)),
            "clients": self._out / "clients",
            "results": [len(manifest["contributions"])],
            "sent_bytes": {name: client.sent for name, client in self.clients.items()},
        }


class Joined:
    """One `edge-client join --wait`, and what it said."""

    def __init__(self, task: Task, out: Path, name: str, address: str, steps: list[Step]) -> None:
        self.steps, self.sent = steps, 0
        self.published: float | None = None
        self.log = out / f"{name}.log"
        self.state = out / "clients" / name
        command = [tool("edge-client"), "join", "--server", address, "--job", JOB, "--data", task.data / name]
        command += ["--model", task.base, "--name", name, "--backend", "torch", "--state", self.state]
        command += ["--save-every", SAVE_EVERY, "--json", "--wait", "--yes"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*map(str, command)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(task.threads)},
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None, "asked for above"
        for line in self.process.stdout:
            said = json.loads(line)
            if said["event"] == "plan":
                self.steps.append(Step(time.time(), 0, said["steps"]))
            elif said["event"] == "continued":
                self.steps[-1] = Step(time.time(), said["step"], said["steps"])
            elif said["event"] == "progress" and said["what"] == "training":
                self.steps.append(Step(time.time(), said["done"], said["total"]))
            elif said["event"] == "receipt":
                self.sent = said["size"]
            elif said["event"] == "published":
                self.published = time.time()
