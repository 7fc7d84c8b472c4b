"""The options that commands share."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from edge_client import backends, session
from edge_client.backends import Backend
from edge_client.connection import identity
from edge_client.connection.target import Target
from edge_client.data import files
from edge_client.pausing import policy, sensors
from edge_client.pausing.controller import PauseController
from edge_client.pausing.policy import PausePolicy, When
from edge_client.session import Participant
from edge_client.training.recipe import BITS, PRECISIONS, Setup
from edge_client.ui.screen import Screen
from edge_client.unattended import watch
from oneround.errors import NotEnough, UsageError

DEFAULT_STATE = identity.DEFAULT_STATE
State = Annotated[Path, typer.Option("--state", help="Where jobs are kept.", show_default="the user's data folder")]
Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON, for scripts.")]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to what will be sent, without being asked; for scripts.")]
Link = Annotated[
    str, typer.Argument(metavar="[LINK]", help="What the operator gave you: oneround://…", show_default=False)
]
OpenJob = Annotated[str, typer.Option("--job", help="The job; not needed when only one is open.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
Model = Annotated[str, typer.Argument(metavar="JOB|FILE", help="A job's name, or a GGUF file.")]
Version = Annotated[int, typer.Option(help="Which one; 0: the newest.", min=0)]
VersionHere = Annotated[
    int, typer.Option(help="Of a job; 0: the newest that is here, and if none is, the newest.", min=0)
]


@dataclass(frozen=True)
class TrainingOptions:
    """What a person trains on, with what, and when; the same for `join`, `stay`, the service and `doctor`."""

    data: Annotated[Path, typer.Option(help="A file or folder: .jsonl, .json, .parquet or .txt.")] = Path("data")
    backend: Annotated[str, typer.Option(help=f"auto, {' or '.join(backends.BACKENDS)}.")] = "auto"
    model: Annotated[Path | None, typer.Option(help="The base model's folder, if it is on this machine.")] = None
    name: Annotated[str, typer.Option(help="What others see.", show_default="this machine's name")] = ""
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")] = (
        False
    )
    save_every: Annotated[float, typer.Option(help="Seconds between two snapshots of training.", min=0)] = (
        session.SAVE_SECONDS
    )
    precision: Annotated[
        str, typer.Option(help=f"auto, {' or '.join(PRECISIONS)}; auto: what this machine is fastest with.")
    ] = "auto"
    bits: Annotated[
        int, typer.Option(help="4 or 8: round the base's weights while training, to save memory; 0: do not.", min=0)
    ] = 0
    when: Annotated[
        list[When],
        typer.Option(
            help="Train only then, and pause otherwise; given twice, both hold. "
            f"Idle: nobody has used the machine for {policy.IDLE_SECONDS / 60:.0f} minutes."
        ),
    ] = field(default_factory=lambda: [When.ALWAYS])
    min_battery: Annotated[
        float, typer.Option(help="Pause on battery below so many percent; 0: never.", min=0, max=90)
    ] = PausePolicy.min_battery
    min_memory: Annotated[
        float,
        typer.Option(
            help="Pause when other programs have less than so many percent of the memory; 0: never.", min=0, max=50
        ),
    ] = PausePolicy.min_memory
    nice: Annotated[bool, typer.Option(help="Let other programs go first, on the CPU and the disk.")] = False

    def from_anywhere(self) -> TrainingOptions:
        """The same, for a process that starts in another folder."""
        return replace(self, data=self.data.absolute(), model=self.model.absolute() if self.model else None)

    def require_data(self) -> None:
        """Raises BadData when the files are not there."""
        files.require(self.data, "edge-client join")

    def pause_policy(self) -> PausePolicy:
        """When training pauses.

        Raises:
            UsageError: it depends on whether somebody uses this machine, and nothing here tells that.
        """
        if When.IDLE in self.when:
            sensors.require_idle()
        return PausePolicy(
            plugged_in=When.PLUGGED_IN in self.when,
            idle=When.IDLE in self.when,
            min_battery=self.min_battery,
            min_memory=self.min_memory,
        )

    def setup(self, backend: Backend) -> Setup:
        """How a backend trains.

        Raises:
            UsageError: there is no such precision, or number of bits.
        """
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(
                f"there is no precision {self.precision!r}", hint=f"--precision auto, {' or '.join(PRECISIONS)}"
            )
        if self.bits not in BITS:
            raise UsageError(f"a base cannot be rounded to {self.bits} bits", hint="--bits 4 or 8; 0 for not at all")
        return Setup(backend.precision() if self.precision == "auto" else self.precision, self.bits)

    def participant(self, state: Path, screen: Screen) -> Participant:
        """Who takes part, with the backend loaded.

        Raises:
            UsageError: this machine has no such backend, or cannot follow another option.
        """
        pausing = PauseController(self.pause_policy())
        with screen.busy("loading the training backend"):
            backend = backends.choose(self.backend)
        return Participant(
            state=state,
            name=self.name or socket.gethostname(),
            data=self.data,
            backend=backend,
            model=self.model,
            skip_bad_rows=self.skip_bad_rows,
            save_every=self.save_every,
            setup=self.setup(backend),
            pausing=pausing,
        )

    def give_way(self) -> None:
        """With `nice`, lower the priority of this process and of the threads that it starts from here on; so before the
        backend is loaded."""
        if self.nice:
            sensors.lower_priority()


UNATTENDED = TrainingOptions(when=[When.PLUGGED_IN], nice=True)


@dataclass(frozen=True)
class WatchOptions:
    """Which jobs a machine takes part in by itself, and how often it looks for them."""

    accept: Annotated[
        list[str],
        typer.Option(
            help="Jobs to take part in: a name, or a pattern such as 'clinic-*'. May be given more than once."
        ),
    ]
    look_every: Annotated[float, typer.Option(help="Seconds between two looks for new jobs.", min=1)] = (
        watch.LOOK_SECONDS
    )

    def require_names(self) -> None:
        """Raises UsageError when a pattern can match no job's name."""
        for pattern in self.accept:
            if not re.fullmatch(r"[a-z0-9._*?\[\]!-]+", pattern):
                raise UsageError(f"no job can have the name {pattern!r}", hint="--accept NAME, or 'clinic-*'")


def invited(target: Target, link: str) -> Target:
    """The coordinator of an invitation, if there is one.

    Raises:
        UsageError: an address is given as well.
    """
    if link and target.server:
        raise UsageError("the invitation says where the coordinator is", hint="leave --server out")
    return replace(target, server=link) if link else target


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to, if it is not there.

    Raises:
        NotEnough: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotEnough(f"cannot write to {folder}: {error.strerror}") from error
