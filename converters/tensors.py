"""safetensors files as memory-mapped NumPy arrays: every dtype, nothing trusted.

The `safetensors` package checks a file's header (offsets, overlaps, sizes); its NumPy side cannot give bfloat16,
so the views are made here, over one read-only map of the file.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from converters.errors import FULL, BadData, NotEnough

Array = NDArray[np.generic]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Later(NamedTuple):
    """A tensor that is made when its turn to be written has come."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read(path: Path) -> tuple[Mapping[str, Array], dict[str, str]]:
    """Tensors by name, as read-only views of the mapped file, and the header's metadata.

    Raises:
        BadData: the file is not there, is not safetensors, or holds a dtype that NumPy cannot view.
    """
    try:
        with safe_open(path, framework="numpy") as checked:
            metadata = dict(checked.metadata() or {})
    except FileNotFoundError:
        raise BadData(f"{path} is not there") from None
    except (SafetensorError, OSError) as error:
        raise BadData(f"{path} is not a safetensors file: {error}") from error

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + length])
    header.pop("__metadata__", None)

    places: dict[str, _Place] = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise BadData(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
        places[name] = _Place(dtype, tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    mapped.madvise(mmap.MADV_DONTNEED)
    return _Views(mapped, places), metadata


class _Place(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class _Views(Mapping[str, Array]):
    """Views that are made when they are asked for: hundreds of files may be open, each with hundreds of tensors."""

    def __init__(self, mapped: mmap.mmap, places: Mapping[str, _Place]) -> None:
        self._mapped, self._places = mapped, places

    def __getitem__(self, name: str) -> Array:
        dtype, shape, start = self._places[name]
        return np.frombuffer(self._mapped, dtype, prod(shape), start).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def forget(array: Array) -> None:
    """Give the pages of the map behind an array back to the system. What is read again comes from its cache.

    Mapped pages count as a process's memory, so whoever walks through large files lets go of what lies behind.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def write(path: Path, tensors: Mapping[str, Array | Later], metadata: Mapping[str, str]) -> None:
    """Write and sync a safetensors file, one tensor at a time; the same content always gives the same bytes.

    Names are sorted, so that two machines that hold equal tensors hold equal digests.
    """
    ordered = sorted(tensors.items())
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format asks for data aligned to 8 bytes
    with placed(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in ordered:
            array = tensor.make() if isinstance(tensor, Later) else tensor
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), name
            file.write(_bytes(array))
            forget(array)


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
        if given := room.exists():
            room.replace(temporary)
        with temporary.open("r+b" if given else "wb") as file:
            yield file
            if given:
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


def _bytes(tensor: Array) -> memoryview:
    # ml_dtypes have no buffer format of their own, so every dtype goes out as plain bytes.
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
