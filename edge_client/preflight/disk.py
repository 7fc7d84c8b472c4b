"""Room on the disk: how much a job still needs, whether it is there, and keeping some of it for the result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from converters.updates.sizes import finished_bytes, snapshot_bytes
from edge_client import outbox
from edge_client.connection.remote import local_path, partial_path
from edge_client.outbox import Outbox
from oneround import files
from oneround.errors import NotEnough
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

MARGIN_BYTES = 64 << 20  # for records, file systems' own needs, and what else goes on


@dataclass(frozen=True)
class DiskNeed:
    """What a job still needs on the disk of a folder, and what is free there; in bytes."""

    folder: Path
    base: int  # the base model's files that are not here yet
    training: int  # the initial adapter, two snapshots, the finished adapter, and a margin
    free: int

    @property
    def needed(self) -> int:
        return self.base + self.training

    def require(self) -> None:
        """Raises NotEnough when more is needed than there is."""
        if self.needed > self.free:
            raise NotEnough(
                f"not enough room on the disk of {self.folder}: this job still needs {self}",
                hint=f"free {human_size(self.needed - self.free)} there, or give --state FOLDER on another disk"
                + (", or --model FOLDER if the base model is on this machine" if self.base else ""),
            )

    def __str__(self) -> str:
        parts = f" ({human_size(self.base)} of them for the base model)" if self.base else ""
        return f"{human_size(self.needed)}{parts}, and {human_size(self.free)} are free"


def room(job: pb.Job, state: Path, model: Path | None) -> DiskNeed:
    """What a job still needs on the disk of the state folder, by what is there already. Nothing once it is trained.

    The snapshots are two because a new one is written beside the old one. `model` is the base model's folder, if the
    person has it.
    """
    box = outbox.outbox(state, job)
    free = shutil.disk_usage(existing(state)).free
    if box.trained() is not None:
        return DiskNeed(state, 0, 0, free)
    folder = outbox.model_folder(state, job)
    base = 0 if model else sum(_missing(local_path(folder, artifact), artifact) for artifact in job.base_files)
    snapshots = 2 * snapshot_bytes(job) - _allocated(box.snapshot)
    finished = finished_bytes(job) - _allocated(files.reserved(box.adapter))
    training = _missing(box.initial, job.initial) + max(snapshots, 0) + max(finished, 0) + MARGIN_BYTES
    return DiskNeed(state, base, training, free)


def keep_room(job: pb.Job, box: Outbox) -> None:
    """Take room for the finished adapter now, so that hours of training never end at a disk that has filled up.

    Raises:
        NotEnough: there is none.
    """
    files.reserve(box.adapter, finished_bytes(job))
    files.reserve(box.record, _RECORD_BYTES)


_RECORD_BYTES = 4096


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _missing(file: Path, artifact: pb.Artifact) -> int:
    """Bytes of an artifact that are not here yet."""
    return 0 if file.is_file() else max(artifact.size - _allocated(partial_path(file, artifact)), 0)


def _allocated(file: Path) -> int:
    """Bytes that a file takes on the disk; 0 if it is not there."""
    return file.stat().st_blocks * 512 if file.exists() else 0
