"""Preparing data, and training."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Bytes, Event, Folder, Gigabytes, Seconds, Words


@dataclass(frozen=True)
class PlanMade(Event, event="plan"):
    """Data and base are here; training is about to begin."""

    base: str
    rank: int
    modules: int
    send_bytes: Bytes
    examples: int
    tokens: int
    held_out: int
    steps: int
    backend: str
    device: str
    rounding: str

    template = (
        "  base      {base}\n"
        "  data      {examples:,} examples, {tokens:,} target tokens; {held_out:,} rows held out. They stay here.\n"
        "  training  {steps:,} steps with {backend} on {device}, {rounding}\n"
        "  to send   {send_bytes:,} bytes and a header, once: LoRA of rank {rank} for {modules} modules"
    )


@dataclass(frozen=True)
class RowsTruncated(Event, event="truncated"):
    """Some rows are longer than the job takes."""

    truncated: int
    dropped: int
    max_seq_len: int

    template = (
        "[yellow]{truncated} examples were longer than {max_seq_len} tokens and were cut; "
        "{dropped} had no answer left and were dropped.[/yellow]"
    )


@dataclass(frozen=True)
class RowsSkipped(Event, event="skipped"):
    """Some rows cannot be used, and `--skip-bad-rows` says to go on without them."""

    skipped: int

    template = "[yellow]{skipped} bad rows were skipped.[/yellow]"


@dataclass(frozen=True)
class BatchSplit(Event, event="parts"):
    """By the estimate a whole batch does not fit into memory, so training begins with smaller parts."""

    parts: int
    checkpointing: bool

    template = "Each batch is processed in {parts} parts, one after the other, so that it fits into memory."


@dataclass(frozen=True)
class BatchHalved(Event, event="halved"):
    """Memory ran out while training; it goes on with smaller parts."""

    step: int
    parts: int
    checkpointing: bool

    template = (
        "[yellow]Memory ran out. From step {step} on each batch is processed in {parts} parts, one after "
        "the other.[/yellow]"
    )


@dataclass(frozen=True)
class MemoryShort(Event, event="memory"):
    """By the estimate training takes more memory than is free."""

    needed_gb: Gigabytes
    available_gb: Gigabytes

    template = (
        "[yellow]Training may take {needed_gb:.1f} GB of memory, and {available_gb:.1f} GB are free: it may be "
        "slow, or the system may end it. Close other programs.[/yellow]"
    )


@dataclass(frozen=True)
class TrainingResumed(Event, event="continued"):
    """Training goes on from the last snapshot, after an interruption."""

    step: int
    steps: int

    template = "Training goes on after step {step} of {steps}"


@dataclass(frozen=True)
class TrainingRestarted(Event, event="anew"):
    """There is a snapshot, but of other data or another job."""

    template = "[yellow]The data or the job has changed since training was interrupted; it starts anew.[/yellow]"


@dataclass(frozen=True)
class TrainingPaused(Event, event="paused"):
    """Training waits, as the person's options ask for."""

    reason: str
    why: Words
    until: Words

    template = "[yellow]Training pauses: {why}.[/yellow] It goes on {until}."


@dataclass(frozen=True)
class TrainingUnpaused(Event, event="unpaused"):
    """A pause is over."""

    seconds: Seconds

    template = "Training goes on after a pause of {seconds:.0f} s"


@dataclass(frozen=True)
class SnapshotFailed(Event, event="not_kept"):
    """A snapshot cannot be written. Training goes on, and this is reported once."""

    why: Words

    template = "[yellow]The state of training cannot be saved: {why}. An interruption now loses steps.[/yellow]"


@dataclass(frozen=True)
class AlreadyTrained(Event, event="resumed"):
    """The adapter of this job is finished from before; only sending is left."""

    folder: Folder

    template = "Already trained; the adapter waits in {folder}"


@dataclass(frozen=True)
class Trained(Event):
    """Training is done."""

    steps: int
    seconds: Seconds
    loss: float

    template = "Trained {steps} steps in {seconds:.0f} s; loss {loss:.3f}"


@dataclass(frozen=True)
class ProgressMade(Event, event="progress"):
    """How far a long step is, at most once a second. `what` is training, sending, base, adapter, measuring, or the name
    of a file that is fetched; `done` and `total` are in steps, bytes or tokens."""

    what: str
    done: int
    total: int
    seconds_left: Seconds
    loss: float | None = None
    tokens_per_second: float | None = None

    template = "{what} {done}/{total} ({percent} %), {seconds_left:.0f} s left"

    @property
    def percent(self) -> int:
        return 100 * self.done // max(self.total, 1)
