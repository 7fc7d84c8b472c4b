"""How a file travels: in chunks from an offset, known by its SHA-256; hashed and on its way to the disk as it comes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from oneround.v1 import federation_pb2 as pb

MAX_CHUNK_BYTES = 1024 * 1024
_LARGE_BYTES = 64 * MAX_CHUNK_BYTES
MAX_MESSAGE_BYTES = MAX_CHUNK_BYTES + 64 * 1024  # room for the fields around a chunk
_HELD_PIECES = 4  # may wait for the disk while more comes in
_BEHIND_BYTES = 32 * 1024 * 1024  # written, not yet on the disk; then the disk is set to work

# A part of a path that means one file on every disk: never hidden, nothing that a shell or a terminal obeys, one form.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._+=@-]{0,198}[A-Za-z0-9_+=@-])?")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # on disks that Windows shares

_syncing = ThreadPoolExecutor(2, "sync")


class Sink:
    """A file that grows by what comes in. What was there when it was opened is the beginning of it.

    `sync` puts what was written on the medium. Its methods block; one thread at a time calls them.
    """

    def __init__(self, path: Path, sync: Callable[[BinaryIO], None]) -> None:
        self._sync = sync
        self._hash = hashlib.sha256()
        if path.exists():
            with path.open("rb") as file:
                while data := file.read(MAX_CHUNK_BYTES):
                    self._hash.update(data)
        self._file = path.open("ab", buffering=0)
        self._behind: Future[None] | None = None
        self._unsynced = 0

    def write(self, pieces: Iterable[bytes]) -> None:
        """Raises OSError when the disk takes no more; what was taken before stays."""
        for data in pieces:
            view = memoryview(data)
            while view:  # an unbuffered file may take less than it is given
                taken = self._file.write(view)
                self._hash.update(view[:taken])
                view = view[taken:]
            self._unsynced += len(data)
        if self._unsynced > _BEHIND_BYTES and (self._behind is None or self._behind.done()):
            self._unsynced = 0
            self._behind = _syncing.submit(self._write_out)

    def digest(self) -> str:
        """SHA-256 of all of it, once all of it is on the medium."""
        self._settle()
        self._sync(self._file)
        return self._hash.hexdigest()

    def close(self) -> None:
        """Let go of the file; what was written stays, for another to go on."""
        self._settle()
        self._file.close()

    def _settle(self) -> None:
        if self._behind is not None:
            self._behind.result()

    def _write_out(self) -> None:
        with suppress(OSError):  # a full disk; the sync at the end will say so
            os.fsync(self._file.fileno())
            if hasattr(os, "posix_fadvise"):
                # Memory that the file's pages give back is used for the next ones. Taking fresh memory for all of a
                # large file costs several times the processor time of writing it, and pushes others' pages out.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def pour(
    source: AsyncIterator[bytes], sink: Sink, threads: Executor, written: Callable[[int], None] = lambda pieces: None
) -> None:
    """Everything from a source into a sink: while the threads hash and write some of it, more is taken from the wire.

    `written` is called with how many pieces have been. What came before an error of the source is in the sink when the
    error is raised.
    """
    waiting: list[bytes] = []
    writing: asyncio.Task[None] | None = None

    async def write() -> None:
        while waiting:
            pieces = waiting[:]
            waiting.clear()
            try:
                await asyncio.get_running_loop().run_in_executor(threads, sink.write, pieces)
            finally:
                count = len(pieces)
                del pieces
                written(count)

    try:
        async for data in source:
            waiting.append(data)
            del data
            if writing is None or writing.done():
                if writing is not None:
                    writing.result()
                writing = asyncio.create_task(write())
            elif len(waiting) >= _HELD_PIECES:
                await writing
    finally:
        if writing is not None:
            await writing


def chunk_bytes(size: int) -> int:
    """How many bytes of a file of `size` travel at a time.

    Each chunk waits until the one before it is taken, so a large file is faster in few of them. Small files come by the
    hundred at the end of a round, and keep each other waiting less in more.
    """
    return MAX_CHUNK_BYTES if size >= _LARGE_BYTES else MAX_CHUNK_BYTES // 2


def pieces(path: Path, offset: int) -> Iterator[bytes]:
    """A file's bytes from `offset` to its end, for one who has nothing else to do: a thread for the reading would cost
    more than the reading."""
    with path.open("rb", buffering=0) as file:
        most = chunk_bytes(os.fstat(file.fileno()).st_size)
        file.seek(offset)
        while data := file.read(most):
            yield data


async def chunks(path: Path, offset: int, threads: Executor, size: Callable[[], int]) -> AsyncIterator[bytes]:
    """A file's bytes from `offset` to its end. The next ones are read while the last are on their way; `size` says
    how many bytes a chunk may have now."""
    loop = asyncio.get_running_loop()
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        reading = loop.run_in_executor(threads, file.read, size())
        try:
            while data := await reading:
                reading = loop.run_in_executor(threads, file.read, size())
                yield data
        finally:
            await asyncio.gather(reading, return_exceptions=True)  # it uses the file


def digest(path: Path) -> str:
    """SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    """Whether a string from the wire can be a digest; it may become part of a path."""
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def is_name(text: str) -> bool:
    """Whether a string from the wire can be a file's path inside a folder: `/` between parts, and no way out of it."""
    parts = text.split("/")
    return len(parts) <= 8 and all(_PART.fullmatch(part) and not _DEVICE.fullmatch(part) for part in parts)


def are_apart(files: Sequence[pb.Artifact]) -> bool:
    """Whether no two of these files are one where a disk takes upper and lower case for the same."""
    return len({file.name.lower() for file in files}) == len(files)


def fingerprint(files: Iterable[pb.Artifact]) -> str:
    """SHA-256 over files' names and digests, in hex: the same on every machine that holds the same files."""
    lines = sorted(f"{file.digest}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
