"""What `status`, `discover` and `doctor` print with `--json`; documented in docs/events.md. The keys are the fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from edge_client.ui.events.event import Address, Bytes, Folder, Sha256, Words


@dataclass(frozen=True)
class JoinedJob:
    """`status`: a job that was joined here. `examples` is null until it is trained, `bytes` until it is sent."""

    job: str
    server: Address
    stage: Literal["joined, not trained", "trained, not sent", "contributed"]
    examples: int | None
    bytes: Bytes | None
    folder: Folder


@dataclass(frozen=True)
class HeardCoordinator:
    """`discover`: a coordinator on this network. `known` is whether this machine has pinned its key."""

    name: str
    addresses: tuple[Address, ...]
    fingerprint: Sha256
    known: bool


@dataclass(frozen=True)
class CheckResult:
    """`doctor`: what a check has found. `hint` is empty where the level is ok."""

    check: str
    level: Literal["ok", "note", "problem"]
    says: Words
    hint: Words


def print_list(rows: Sequence[JoinedJob] | Sequence[HeardCoordinator]) -> None:
    """The whole answer at once."""
    print(json.dumps([asdict(row) for row in rows], indent=2))


def print_line(row: CheckResult) -> None:
    """One of several, as it comes."""
    print(json.dumps(asdict(row)), flush=True)
