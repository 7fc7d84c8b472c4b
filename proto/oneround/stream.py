"""How a file travels: in chunks from an offset, known by its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from oneround.v1 import federation_pb2 as pb

CHUNK_BYTES = 512 * 1024  # the throughput of Python's gRPC is flat from 256 KiB to 1 MiB
MAX_CHUNK_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = MAX_CHUNK_BYTES + 64 * 1024  # room for the fields around a chunk


def chunks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The file's bytes from `offset` to its end, at most CHUNK_BYTES at a time."""
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(CHUNK_BYTES):
            yield data


def digest(path: Path) -> str:
    """SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    """Whether a string from the wire can be a digest; it may become part of a path."""
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def fingerprint(files: Iterable[pb.Artifact]) -> str:
    """SHA-256 over files' names and digests, in hex: the same on every machine that holds the same files."""
    lines = sorted(f"{file.digest}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
