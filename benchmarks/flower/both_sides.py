"""What a round is asked to do on either side, and how one is driven and measured: `against_flower.py` has the arms."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
from counted import counted
from served import Memory, Others, say

POLL = 0.1  # seconds
PATIENCE = 1800.0  # seconds until a run that does not end is given up
Found = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """The same work for both."""

    base: Path
    data: Path  # a folder per client
    clients: tuple[str, ...]
    quorum: int
    seed: int
    epochs: float
    learning_rate: float = 2e-3
    batch_size: int = 8
    sequence: int = 256
    rank: int = 16
    alpha: int = 32
    timeout: float = 600.0  # seconds: the round's deadline here, and how long a Flower server waits for its clients
    grace: float = 60.0  # seconds that our coordinator waits for the rest once the quorum is in
    threads: int = 1  # of each client


@dataclass(frozen=True)
class Kill:
    """SIGKILL to all processes of a client once it has done this share of its steps; started anew later, or not."""

    client: str
    at: float = 0.5
    again_after: float | None = None  # seconds


@dataclass(frozen=True)
class Step:
    at: float  # seconds since the Unix epoch
    done: int
    total: int


class Side(Protocol):
    """A server that runs, and clients that are started against it."""

    pid: int
    address: str

    def join(self, client: str, address: str) -> int:
        """Start a client, again if it was there; its process id."""

    def begin(self) -> None:
        """All clients are started."""

    def steps(self, client: str) -> Sequence[Step]:
        """How far it was when; not after every step. The first since a start says what it started from."""

    def finished(self) -> float | None:
        """When the model was there, in seconds since the epoch; ends the script when it never will be."""

    def result(self) -> Found:
        """What came of it, with the `adapter` that was published."""


def measured(opened: AbstractContextManager[Side], task: Task, kill: Kill | None = None) -> Found:
    """One run from the start of the clients to the model. Time, bytes, memory, and what the side says of the result."""
    with opened as side, counted(side.address) as wire:
        memory, others = Memory(side.pid), Others()
        began = time.time()
        running = {name: side.join(name, wire.address) for name in task.clients}
        side.begin()
        killed: Found = {}
        while (finished := side.finished()) is None:
            if time.time() - began > PATIENCE:
                sys.exit(f"no model after {PATIENCE:.0f} seconds")
            if kill:
                _strike(kill, killed, side, running, wire.address)
            time.sleep(POLL)
        up, down = wire.passed
        server = memory.stop()
        steps = {name: side.steps(name) for name in task.clients}
        first = min(step.at for some in steps.values() for step in some if step.done)
        last = max(some[-1].at for some in steps.values() if some)
        found = {
            "seconds_to_model": finished - began,
            "seconds_from_first_step": finished - first,
            "seconds_start_up": first - began,
            "seconds_after_last_step": finished - last,
            "bytes_up": up,
            "bytes_down": down,
            "server": server,
            "others_share_of_processors": others.share(),
        }
        result = side.result()
    if kill:
        died = killed["at"]
        anew = [step for step in steps[kill.client] if step.at > killed.get("again", float("inf"))]
        result["killed"] = {
            "client": kill.client,
            "after_steps": killed["step"],
            "started_again_after_seconds": kill.again_after,
            "model_seconds_after_the_kill": round(finished - died, 2),
            "goes_on_after_step": anew[0].done if anew else None,
        }
    say(f"  model after {found['seconds_to_model']:.0f} s, {up + down:,} bytes")
    return found | result


def _strike(kill: Kill, killed: Found, side: Side, running: dict[str, int], address: str) -> None:
    now = time.time()
    steps = side.steps(kill.client)
    if not killed:
        if steps and steps[-1].done >= kill.at * steps[-1].total:
            end(running[kill.client])
            killed |= {"at": now, "step": steps[-1].done}
            say(f"  {kill.client} killed after step {steps[-1].done} of {steps[-1].total}")
    elif kill.again_after is not None and "again" not in killed and now > killed["at"] + kill.again_after:
        running[kill.client] = side.join(kill.client, address)
        killed["again"] = now


def end(pid: int) -> None:
    """SIGKILL to a process of ours and to all that it has started, as a power cut would."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
