"""What an examination is about, and what it finds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_client.backends import Backend
from edge_client.connection.remote import Remote
from edge_client.connection.target import ANY, Target
from edge_client.session.prepare import Prepared
from edge_client.training.recipe import Setup
from oneround.errors import OneroundError
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Finding:
    """What one check found, in a line; a note and a problem have a way out, and a problem an exit code."""

    check: str
    level: Literal["ok", "note", "problem"]
    says: str
    hint: str = ""
    exit_code: int = 0


@dataclass
class Case:
    """What the command line says, and below it what the checks have found out so far, for those that follow."""

    state: Path
    target: Target = ANY
    job_name: str = ""
    data: Path = Path("data")
    backend_name: str = "auto"
    model: Path | None = None
    skip_bad_rows: bool = False
    setup: Callable[[Backend], Setup] = lambda backend: Setup(backend.precision())  # how the person would train

    backend: Backend | None = None
    remote: Remote | None = None  # answers, or showed a certificate at least
    first_use: bool = False  # nobody has pinned its key yet
    key_changed: OneroundError | None = None
    unreached: str = ""  # why no coordinator answers
    jobs: pb.ListJobsReply | None = None
    skew: float = 0.0  # seconds that this machine's clock is ahead of the coordinator's
    job: pb.Job | None = None
    done: bool = False  # trained already; only sending is left, if anything
    base: Path | None = None  # the base model's folder; or one with its small files
    prepared: Prepared | None = None  # the data as join would train on it
    open_now: AsyncExitStack = field(default_factory=AsyncExitStack)


# A check returns what it found, None where it has nothing to look at, and raises what stops a job as `join` would.
Check = Callable[[Case], Awaitable["Finding | None"]]


def ok(check: str, says: str) -> Finding:
    return Finding(check, "ok", _line(says))


def note(check: str, says: str, hint: str) -> Finding:
    return Finding(check, "note", _line(says), _line(hint))


def problem(check: str, error: OneroundError) -> Finding:
    return Finding(check, "problem", _line(str(error)), _line(error.hint), error.exit_code)


def _line(text: str) -> str:
    return " ".join(text.split())
