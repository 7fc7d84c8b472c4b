"""Bytes that a job's updates take, by its spec and its modules alone; every kind says how many numbers it has."""

from __future__ import annotations

from converters.updates.kinds import kind_of
from converters.updates.update import WIRE_DTYPES
from oneround.v1 import federation_pb2 as pb

_FLOAT = 4  # bytes of a float32
_COPIES = 3  # in a snapshot: what is trained, and two moments of it


def elements(job: pb.Job) -> int:
    """Numbers that are trained and sent."""
    return kind_of(job.spec).elements(job)


def snapshot_bytes(job: pb.Job) -> int:
    """Size of a snapshot: what is trained and two moments of each number, in float32; a little more, never less."""
    return _COPIES * _FLOAT * elements(job) + _header_bytes(job, _COPIES)


def sent_bytes(job: pb.Job) -> int:
    """Size of a finished update without its header, in the dtype that it travels in."""
    return WIRE_DTYPES[job.spec.upload.dtype].itemsize * elements(job)


def finished_bytes(job: pb.Job) -> int:
    """Size of a finished update; a little more, never less."""
    return sent_bytes(job) + _header_bytes(job)


def most_initial_bytes(job: pb.Job) -> int:
    """The most that the file of the initial update may have: all of it, in float32."""
    return _FLOAT * kind_of(job.spec).elements(job, whole=True) + _header_bytes(job)


def most_upload_bytes(job: pb.Job) -> int:
    """The most that an upload may have: a whole update in float32, with room for any header."""
    return _FLOAT * kind_of(job.spec).elements(job, whole=True) + 1024 * len(job.modules) + 65536


def _header_bytes(job: pb.Job, copies: int = 1) -> int:
    """At most what safetensors needs to name the tensors."""
    tensors = copies * kind_of(job.spec).TENSORS
    return 16_384 + sum(tensors * (len(module.name) + 160) for module in job.modules)
