"""safetensors files as memory-mapped NumPy arrays: every dtype, nothing trusted.

The `safetensors` package checks a file's header (offsets, overlaps, sizes); its NumPy side cannot give bfloat16,
so the views are made here, over one read-only map of the file.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from oneround import files
from oneround.errors import BadData

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
    with files.placed(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in ordered:
            array = tensor.make() if isinstance(tensor, Later) else tensor
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), name
            file.write(_bytes(array))
            forget(array)


def _bytes(tensor: Array) -> memoryview:
    # ml_dtypes have no buffer format of their own, so every dtype goes out as plain bytes.
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
