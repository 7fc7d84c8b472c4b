"""What survives on this machine: the job, the finished adapter until it has its receipt, and the receipt.

    STATE/models/FINGERPRINT/      base models, shared by all jobs
    STATE/models/FINGERPRINT.gguf  the same as a GGUF, once it is needed to evaluate
    STATE/jobs/NAME-ID/            one job: consent, joined.json, source.json, initial.safetensors, training.safetensors
                                   while it is trained, trained.safetensors, trained.json, receipt.json, left (by its
                                   person); ID is the job's own, so a job made anew is another one
    STATE/published/NAME/vN/       published models that were fetched to be used

Each file is put in place whole; a step is done when its file is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from converters import adapter
from converters.adapter import Adapter
from oneround import files, rules, stream
from oneround.errors import BadData, NotEnough, Refused, UsageError
from oneround.v1 import federation_pb2 as pb

Record = TypeVar("Record", bound=Message)


@dataclass(frozen=True)
class DataSource:
    """Where training took its data and its base from; paths are whole."""

    data: str
    model: str = ""  # the person's own copy of the base; empty: the one in the state folder
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class Outbox:
    """One job's folder."""

    folder: Path

    @property
    def initial(self) -> Path:
        return self.folder / "initial.safetensors"

    @property
    def snapshot(self) -> Path:
        """Where training stands, while it goes on."""
        return self.folder / "training.safetensors"

    @property
    def adapter(self) -> Path:
        return self.folder / "trained.safetensors"

    @property
    def record(self) -> Path:
        """What the finished adapter declares; it is finished when this is there."""
        return self.folder / "trained.json"

    def joined(self) -> pb.JoinReply | None:
        """The lease and the job as they were announced."""
        return _read(self.folder / "joined.json", pb.JoinReply())

    def trained(self) -> pb.Declaration | None:
        """What the finished adapter declares; None while there is none."""
        return _read(self.record, pb.Declaration())

    @property
    def receipt_file(self) -> Path:
        """The receipt as it came; it holds no secret, and can be given away."""
        return self.folder / "receipt.json"

    def receipt(self) -> pb.Receipt | None:
        return _read(self.receipt_file, pb.Receipt())

    def keep_joined(self, server: str, reply: pb.JoinReply) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "left").unlink(missing_ok=True)
        files.replace(self.folder / "server", [server.encode()])
        _write(self.folder / "joined.json", reply)

    def keep_left(self) -> None:
        """The person left the job: nothing joins it again by itself."""
        (self.folder / "left").touch()

    def is_over(self) -> bool:
        """Whether this machine's part is done, or was given up by its person."""
        return (self.folder / "left").exists() or self.receipt() is not None

    def keep_source(self, source: DataSource) -> None:
        """Remember what this job is trained on."""
        files.replace(self.folder / "source.json", [json.dumps(asdict(source)).encode()])

    def source(self) -> DataSource | None:
        """What this job was trained on; None if that is not known."""
        try:
            return DataSource(**json.loads((self.folder / "source.json").read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise BadData(
                f"{self.folder / 'source.json'} is damaged: {error}", hint="remove it, and use --data"
            ) from error

    def consent(self) -> str:
        """The digest of the terms that the person agreed to; empty if there are none."""
        file = self.folder / "consent"
        return file.read_text() if file.exists() else ""

    def keep_consent(self, digest: str) -> None:
        """The person has agreed to the terms of this digest."""
        files.replace(self.folder / "consent", [digest.encode()])

    def server(self) -> str:
        """The coordinator's address when this job was last joined."""
        return (self.folder / "server").read_text()

    def keep_trained(
        self, trained: Adapter, dtype: str, declaration: pb.Declaration, frozen_a: str = ""
    ) -> pb.Declaration:
        """Write the adapter as it will travel, then the declaration with its digest and size. With `frozen_a`, the
        initial adapter's digest, B travels alone.

        Raises:
            NotEnough: the disk is full. The last snapshot stays.
        """
        try:
            adapter.write(trained, self.adapter, dtype, frozen_a)
            declaration.digest = stream.digest(self.adapter)
            declaration.size = self.adapter.stat().st_size
            _write(self.record, declaration)
        except NotEnough as error:
            error.hint = "make room there, and run the same command again: training goes on from where it was last kept"
            raise
        self.snapshot.unlink(missing_ok=True)
        return declaration

    def begin_again(self, sent: str) -> None:
        """Set aside what was sent (its digest), so that another training can take its place. What was trained since and
        has not been sent yet stays."""
        trained = self.trained()
        if trained is not None and trained.digest == sent:
            for file in (self.record, self.adapter, self.receipt_file):
                file.unlink(missing_ok=True)

    def keep_receipt(self, receipt: pb.Receipt) -> pb.Receipt:
        _write(self.receipt_file, receipt)
        return receipt


def outbox(state: Path, job: pb.Job) -> Outbox:
    """The folder of a job."""
    return Outbox(state / "jobs" / f"{job.spec.name}-{job.id[:12]}")


def all_outboxes(state: Path) -> Sequence[Outbox]:
    """Every job that this machine has joined, the last one first."""
    folders = [file.parent for file in (state / "jobs").glob("*/joined.json")]
    return [
        Outbox(folder) for folder in sorted(folders, key=lambda f: (f / "joined.json").stat().st_mtime, reverse=True)
    ]


def of_job(state: Path, name: str, deadline: float) -> Iterator[Outbox]:
    """The box, if there is one, of the job of this name with this deadline (seconds since the Unix epoch)."""
    for box in all_outboxes(state):
        joined = box.joined()
        if joined is not None and joined.job.spec.name == name and joined.job.deadline_unix == deadline:
            yield box


def moved(state: Path, before: str, now: str) -> None:
    """The coordinator at one address is at another now."""
    for box in all_outboxes(state):
        if box.server() == before:
            files.replace(box.folder / "server", [now.encode()])


def find(state: Path, name: str) -> Outbox:
    """The last job of this name.

    Raises:
        Refused: this machine has joined none.
    """
    for box in all_outboxes(state):
        joined = box.joined()
        if joined is not None and joined.job.spec.name == name:
            return box
    raise Refused(f"this machine has not joined a job {name!r}", hint="edge-client status")


def published_folder(state: Path, name: str) -> Path:
    """Where a job's published models are kept to be used, a folder a version.

    Raises:
        UsageError: this cannot be a job's name.
    """
    if not rules.is_job_name(name):
        raise UsageError(f"{name} is neither a GGUF file nor a job's name", hint="edge-client status")
    return state / "published" / name


def published_here(state: Path, name: str, version: int = 0) -> Path | None:
    """A published model that was fetched before: of this version, or of the newest (0); the most precise one."""
    most_precise: dict[int, Path] = {}
    for file in published_folder(state, name).glob("v*/*.gguf"):
        number = file.parent.name.removeprefix("v")
        if number.isdecimal() and file.name[0] != ".":
            before = most_precise.setdefault(int(number), file)
            most_precise[int(number)] = max(before, file, key=lambda gguf: gguf.stat().st_size)
    return most_precise.get(version or max(most_precise, default=0))


def model_folder(state: Path, job: pb.Job) -> Path:
    """Where a job's base model is kept."""
    return state / "models" / job.base_fingerprint


def base_gguf(state: Path, job: pb.Job) -> Path:
    """Where a job's base model is kept as a GGUF."""
    return state / "models" / f"{job.base_fingerprint}.gguf"


def _read(file: Path, record: Record) -> Record | None:
    try:
        return json_format.Parse(file.read_text("utf-8"), record, ignore_unknown_fields=True)  # of other versions
    except FileNotFoundError:
        return None
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise BadData(f"{file} is damaged: {error}", hint=f"remove {file.parent}, and join again") from error


def _write(file: Path, record: Message) -> None:
    files.replace(file, [json_format.MessageToJson(record, preserving_proto_field_name=True).encode()])
