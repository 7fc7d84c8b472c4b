"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_client import backends
from edge_client.connection import identity
from edge_client.pausing import policy, sensors
from edge_client.pausing.controller import PauseController
from edge_client.pausing.policy import PausePolicy
from edge_client.training.recipe import BITS, PRECISIONS, Setup
from oneround.errors import NotEnough, UsageError

DEFAULT_STATE = identity.DEFAULT_STATE
State = Annotated[Path, typer.Option("--state", help="Where jobs are kept.", show_default="the user's data folder")]
Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON, for scripts.")]
Data = Annotated[Path, typer.Option(help="A file or folder: .jsonl, .json, .parquet or .txt.")]
Backend = Annotated[str, typer.Option(help="auto, torch or mlx.")]
Model = Annotated[Path | None, typer.Option(help="The base model's folder, if it is on this machine.")]
Name = Annotated[str, typer.Option(help="What others see.", show_default="this machine's name")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")]

Yes = Annotated[bool, typer.Option("--yes", help="Agree to what will be sent, without being asked; for scripts.")]
Precision = Annotated[
    str, typer.Option(help=f"auto, {' or '.join(PRECISIONS)}; auto: what this machine is fastest with.")
]
Bits = Annotated[
    int, typer.Option(help="4 or 8: round the base's weights while training, to save memory; 0: do not.", min=0)
]

When = Annotated[
    list[policy.When],
    typer.Option(
        "--when",
        help="Train only then, and pause otherwise; given twice, both hold. "
        f"Idle: nobody has used the machine for {policy.IDLE_SECONDS / 60:.0f} minutes.",
    ),
]
MinBattery = Annotated[
    float, typer.Option(help="Pause on battery below so many percent; 0: never.", min=0, max=90, show_default=True)
]
MinMemory = Annotated[
    float,
    typer.Option(
        help="Pause when other programs have less than so many percent of the memory; 0: never.", min=0, max=50
    ),
]
Nice = Annotated[bool, typer.Option("--nice", help="Let other programs go first, on the CPU and the disk.")]

MANNERS = PausePolicy()
ALWAYS = [policy.When.ALWAYS]
PLUGGED_IN = [policy.When.PLUGGED_IN]


def setup(backend: backends.Backend, precision: str, bits: int) -> Setup:
    """How a backend is to train.

    Raises:
        UsageError: there is no such precision, or number of bits.
    """
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(f"there is no precision {precision!r}", hint=f"--precision auto, {' or '.join(PRECISIONS)}")
    if bits not in BITS:
        raise UsageError(f"a base cannot be rounded to {bits} bits", hint="--bits 4 or 8; 0 for not at all")
    return Setup(backend.precision() if precision == "auto" else precision, bits)


def pausing(when: list[policy.When], min_battery: float, min_memory: float, nice: bool) -> PauseController:
    """A guest with these manners. A lower priority begins here, so that threads that start later have it too.

    Raises:
        UsageError: it is to be told whether somebody uses this machine, and it cannot be.
    """
    asked = PausePolicy(
        plugged_in=policy.When.PLUGGED_IN in when,
        idle=policy.When.IDLE in when,
        min_battery=min_battery,
        min_memory=min_memory,
    )
    if asked.idle:
        sensors.require_idle()
    if nice:
        sensors.lower_priority()
    return PauseController(asked)


def make(folder: Path) -> None:
    """A folder that can be written to, made if it is not there.

    Raises:
        NotEnough: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotEnough(f"cannot write to {folder}: {error.strerror}") from error
