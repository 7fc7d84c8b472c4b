"""Files put in place whole or not at all: written under a temporary name, synced, renamed.

Room for a file can be reserved on the disk beforehand.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from oneround.errors import FULL, NotEnough


def replace(path: Path, pieces: Iterable[bytes | memoryview], *, private: bool = False) -> None:
    """Put a file in place whole or not at all; `private`: for nobody but its owner to read."""
    with placed(path) as file:
        if private:
            os.fchmod(file.fileno(), 0o600)  # before there is anything to read
        for piece in pieces:
            file.write(piece)


@contextmanager
def placed(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name, which appears at `path` when the block ends well, and else not at all.

    Written, synced, renamed, and the folder synced. Room that was reserved is written over, from the start to the end,
    and not given back first.

    Raises:
        NotEnough: the disk is full.
    """
    temporary, room = partial(path), reserved(path)
    with _whole_or_gone(path, temporary):
        if is_reserved := room.exists():
            room.replace(temporary)
        with temporary.open("r+b" if is_reserved else "wb") as file:
            yield file
            if is_reserved:
                file.truncate()
            sync(file)
        temporary.replace(path)
    sync_folder(path.parent)


def partial(path: Path) -> Path:
    """The temporary name under which a file is written."""
    return path.with_name(f".{path.name}.partial")


def reserved(path: Path) -> Path:
    """The name of the room that is kept for a file."""
    return path.with_name(f".{path.name}.room")


def reserve(path: Path, size: int) -> None:
    """Take room on the disk now for the `size` bytes that will be written to `path` by `placed`.

    Raises:
        NotEnough: there is none.
    """
    room = reserved(path)
    with _whole_or_gone(path, room), room.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # macOS has no such call, nor have some file systems
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            for start in range(file.tell(), size, 1 << 20):  # what is written is there
                file.write(bytes(min(1 << 20, size - start)))
        sync(file)


@contextmanager
def _whole_or_gone(path: Path, temporary: Path) -> Iterator[None]:
    """Nothing is left under a temporary name when a block fails; a full disk is NotEnough."""
    try:
        yield
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise NotEnough(f"there is no room on the disk for {path}") from error
        raise


def sync(file: BinaryIO) -> None:
    """Put what was written to a file on the medium. On macOS fsync stops at the drive's cache; F_FULLFSYNC does not."""
    file.flush()
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
    else:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """A rename is durable only once the folder that names the file is synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
