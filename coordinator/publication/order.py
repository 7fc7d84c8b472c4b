"""The order for a publication: everything that it is a function of, as a file for the process that makes it.

The daemon writes it each time before it starts that process, so that no order of another version is ever read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from google.protobuf import json_format

from oneround.manifest import ContributionEntry, StartedFrom
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Candidate:
    """One contribution that is sound by itself."""

    client: str
    id: str
    digest: str
    num_examples: int
    received: float
    by_hand: bool  # admitted by the operator
    earlier: str  # why an earlier cohort set it aside; empty if none did
    file: Path


@dataclass(frozen=True)
class BuildOrder:
    """Everything that a publication is a function of."""

    spec: pb.JobSpec
    job_id: str
    version: int
    reason: str
    at_least: int  # contributions that have to be left once the cohort is judged
    base_folder: Path
    base_gguf: Path
    base_fingerprint: str
    contributions: Sequence[Candidate]
    set_aside: Sequence[ContributionEntry]  # what takes no part
    folder: Path  # where the publication will stand
    # What clients started from: where A is frozen, its A goes with every contribution; in a job that starts from an
    # earlier adapter, it is in every contribution.
    initial: Path | None = None
    started_from: StartedFrom = field(default_factory=StartedFrom)

    def beside(self, suffix: str) -> Path:
        """A place beside the publication's: `.partial` is where it is made, `.failed` where it is kept if that fails,
        `.withheld` where files go that are not released."""
        return self.folder.with_name(f"{self.folder.name}{suffix}")

    def to_json(self) -> str:
        table = asdict(self) | {"spec": json_format.MessageToDict(self.spec, preserving_proto_field_name=True)}
        return json.dumps(table, default=str)

    @staticmethod
    def from_json(text: str) -> BuildOrder:
        table = json.loads(text)
        table["spec"] = json_format.ParseDict(table["spec"], pb.JobSpec())
        table["contributions"] = [
            Candidate(**{**candidate, "file": Path(candidate["file"])}) for candidate in table["contributions"]
        ]
        table["set_aside"] = [ContributionEntry(**entry) for entry in table["set_aside"]]
        table["started_from"] = StartedFrom(**table["started_from"])
        for key in ("base_folder", "base_gguf", "folder"):
            table[key] = Path(table[key])
        table["initial"] = Path(table["initial"]) if table["initial"] else None
        return BuildOrder(**table)
