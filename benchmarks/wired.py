"""A coordinator, one base, and three clients that reach it over wires that count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stdlib_packages as packages
from cohort import Board, Client, coordinator, run
from counted import Wire, counted
from rich.console import Console

DATA = ("asyncio", "email", "xml")  # one client each
TRAIN_BYTES, HELD_OUT_BYTES = 20_000, 2_000

JOB = """\
name = "{name}"
[model]
base = "{base}"
[lora]
rank = 16
alpha = 32
{lora}
[train]
epochs = {epochs}
learning_rate = 1e-3
batch_size = 8
max_seq_len = 256
[round]
min_clients = {clients}
target_clients = {clients}
deadline = "2h"
[upload]
dtype = "bfloat16"
[aggregate]
method = "{method}"
"""

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Arm:
    """A job, as far as arms differ in it."""

    method: str
    lora: str = ""  # more lines of the job's [lora]
    rounds: int = 1


@dataclass(frozen=True)
class Site:
    """A running coordinator, one base, and the clients' wires."""

    out: Path
    base: Path
    data: Path
    wires: dict[str, Wire]  # by client
    board: Board

    def submit(self, name: str, arm: Arm, *, lora: str = "", epochs: float = 1, clients: int = len(DATA)) -> None:
        job = self.out / f"{name}.toml"
        fields = {"lora": "\n".join([arm.lora, lora]), "epochs": epochs, "clients": clients}
        job.write_text(JOB.format(name=name, base=self.base, method=arm.method, **fields))
        run("coordinator", "submit", job, "--state", self.out / "coordinator")

    def client(self, name: str, job: str, threads: int) -> Client:
        return Client(
            name,
            server=self.wires[name].address,
            job=job,
            backend="torch",
            data=self.data / name,
            out=self.out,
            threads=threads,
            board=self.board,
            model=self.base,
        )

    def status(self, job: str) -> dict[str, Any]:
        return dict(json.loads(run("coordinator", "show", job, "--state", self.out / "coordinator", "--json")))


@contextmanager
def site(work: Path, name: str, base: Path) -> Iterator[Site]:
    """In a folder of this name under `work`, where `data` is too."""
    out = work / name
    out.mkdir(parents=True)
    with coordinator(out) as server, ExitStack() as stack:
        wires = {name: stack.enter_context(counted(server)) for name in DATA}
        yield Site(out, base, work / "data", wires, stack.enter_context(Board(console)))


def prepare(work: Path) -> None:
    """Every client's few rows of data, which all sites in a folder share."""
    for name in DATA:
        packages.split(name, work / "data" / name, train_bytes=TRAIN_BYTES, held_out_bytes=HELD_OUT_BYTES)
