"""GGUF files, read with nothing trusted.

The `gguf` package knows the format's numbers and is used for them. Its reader keeps an object for every token and
follows the lengths that a file claims, and its writer decodes and encodes every key; here a key is a slice of bytes
that was walked over once, so copying (`gguf_write`) is verbatim and a hostile length is an error.

Source: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize
from numpy.typing import NDArray

from converters.gguf.types import FLOATS
from oneround.errors import BadModel

Bytes = NDArray[np.uint8]
_Kind = GGUFValueType
SCALARS: dict[int, str] = {
    _Kind.UINT8: "B",
    _Kind.INT8: "b",
    _Kind.UINT16: "H",
    _Kind.INT16: "h",
    _Kind.UINT32: "I",
    _Kind.INT32: "i",
    _Kind.FLOAT32: "f",
    _Kind.UINT64: "Q",
    _Kind.INT64: "q",
    _Kind.FLOAT64: "d",
    _Kind.BOOL: "?",
}
_MOST_DIMENSIONS = 4
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FLOATS_BY_TYPE = {float_type.type: float_type for float_type in FLOATS.values()}


class Info(NamedTuple):
    """A tensor to come: its shape in NumPy's order, (out, in), and its type."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // int(block) * int(size)

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


class Tensor(NamedTuple):
    """A tensor's description, and its bytes as a view of the mapped file."""

    info: Info
    data: Bytes


class File(NamedTuple):
    """A GGUF file: keys with their typed values as they stand in the file, and tensors in the file's order."""

    keys: Mapping[str, bytes]
    tensors: Mapping[str, Tensor]

    def value(self, key: str) -> int | float | bool | str | None:
        """A number, flag or string; None when the key is absent or holds an array."""
        raw = self.keys.get(key)
        if raw is None:
            return None
        kind = int.from_bytes(raw[:4], "little")
        if kind == _Kind.STRING:
            return raw[12:].decode("utf-8", errors="replace")
        if kind in SCALARS:
            value: int | float | bool = struct.unpack(f"<{SCALARS[kind]}", raw[4:])[0]
            return value
        return None

    def token(self, key: str) -> str:
        """The text of the token whose number is under `key`; empty when there is none."""
        number, raw = self.value(key), self.keys.get("tokenizer.ggml.tokens")
        if not isinstance(number, int) or raw is None or int.from_bytes(raw[4:8], "little") != _Kind.STRING:
            return ""
        count, at = int.from_bytes(raw[8:16], "little"), 16
        for n in range(count):
            length = int.from_bytes(raw[at : at + 8], "little")
            if n == number:
                return raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace")
            at += 8 + length
        return ""


def read(path: Path) -> File:
    """Map a GGUF file and walk its header; no tensor is read.

    Of a model that was split (`NAME-00001-of-00003.gguf`) any part stands for the whole; all have to be there.

    Raises:
        BadModel: the file is not there, is not GGUF, is cut short, or claims what cannot be.
    """
    if len(together := parts(path)) == 1:
        return _part(path)
    tensors: dict[str, Tensor] = {}
    keys: Mapping[str, bytes] = {}
    for part in together:
        file = _part(part)
        keys = keys or {key: value for key, value in file.keys.items() if not key.startswith("split.")}
        if double := tensors.keys() & file.tensors.keys():
            raise BadModel(f"{part}: the tensor {min(double)} is in another part too")
        tensors.update(file.tensors)
    return File(keys, tensors)


def parts(path: Path) -> list[Path]:
    """The files of a model that was split, of which `path` is any; else `path` alone.

    Raises:
        BadModel: a part is missing.
    """
    if (split := _SPLIT.fullmatch(path.name)) is None:
        return [path]
    count = int(split["count"])
    if not path.is_file() or not 1 <= int(split["number"]) <= count:
        return [path]
    names = [f"{split['stem']}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise BadModel(f"{path} is one of {count} parts, and {len(missing)} are missing: {', '.join(missing[:3])}")
    return [path.with_name(name) for name in names]


def _part(path: Path) -> File:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise BadModel(f"{path} cannot be read: {error}") from error
    try:
        return _Walk(mapped).file()
    except (struct.error, UnicodeDecodeError) as error:
        raise BadModel(f"{path} is not a sound GGUF file: {error}") from error
    except _Unsound as error:
        raise BadModel(f"{path} is not a sound GGUF file: {error}") from None


def to_float32(tensor: Tensor, rows: slice = slice(None)) -> NDArray[np.float32]:
    """A tensor's values in its shape, or some of its rows (n, in). A view where they are float32 already.

    Quantised types are dequantised by the `gguf` package.

    Raises:
        NotImplementedError: it has no such type.
    """
    info = tensor.info
    lines = tensor.data.reshape(-1, info.row_bytes)[rows]
    if float_type := _FLOATS_BY_TYPE.get(info.type):
        values = lines.view(float_type.dtype).astype(np.float32, copy=False)
    else:
        with np.errstate(all="ignore"):  # a scale may be Inf or NaN in a file that is not ours
            values = dequantize(lines, info.type)
    return values.reshape(info.shape if rows == slice(None) else (len(lines), info.shape[-1]))


class _Unsound(Exception):
    """What is wrong with the file that is being walked."""


class _Walk:
    """One pass over a header."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._at = 0

    def file(self) -> File:
        if self._unpack("I") != GGUF_MAGIC:
            raise _Unsound("it does not begin with GGUF")
        if (version := self._unpack("I")) not in (2, GGUF_VERSION):
            raise _Unsound(f"its version is {version}; versions 2 and 3, little-endian, are known")
        n_tensors, n_keys = self._unpack("Q"), self._unpack("Q")
        keys: dict[str, bytes] = {}
        for _ in range(n_keys):
            key, start = self._text(), self._at
            self._skip_value(self._unpack("I"))
            if key in keys:
                raise _Unsound(f"the key {key} is there twice")
            keys[key] = self._mapped[start : self._at]
        placed: dict[str, tuple[Info, int]] = {}
        for _ in range(n_tensors):
            info, offset = self._info()
            if info.name in placed:
                raise _Unsound(f"the tensor {info.name} is there twice")
            placed[info.name] = info, offset
        alignment = File(keys, {}).value("general.alignment")
        alignment = GGUF_DEFAULT_ALIGNMENT if alignment is None else alignment
        if not isinstance(alignment, int) or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise _Unsound(f"general.alignment is {alignment}")
        return File(keys, dict(self._views(placed, self._at + padding(self._at, alignment), alignment)))

    def _views(
        self, placed: Mapping[str, tuple[Info, int]], begin: int, alignment: int
    ) -> Iterator[tuple[str, Tensor]]:
        whole = np.frombuffer(self._mapped, np.uint8)
        end = 0
        for name, (info, offset) in sorted(placed.items(), key=lambda item: item[1][1]):
            if offset < end:
                raise _Unsound(f"the tensor {name} lies over another")
            end = offset + info.nbytes
        for name, (info, offset) in placed.items():
            if offset % alignment or begin + offset + info.nbytes > len(whole):
                raise _Unsound(f"the tensor {name} lies outside the file")
            yield name, Tensor(info, whole[begin + offset : begin + offset + info.nbytes])

    def _info(self) -> tuple[Info, int]:
        name, n_dims = self._text(), self._unpack("I")
        if not 1 <= n_dims <= _MOST_DIMENSIONS:
            raise _Unsound(f"the tensor {name} has {n_dims} dimensions")
        shape = tuple(self._unpack("Q") for _ in range(n_dims))[::-1]
        if 0 in shape:
            raise _Unsound(f"the tensor {name} {shape} is empty")
        number, offset = self._unpack("I"), self._unpack("Q")
        if number not in {kind.value for kind in GGML_QUANT_SIZES}:
            raise _Unsound(f"the tensor {name} has the unknown type {number}")
        info = Info(name, shape, GGMLQuantizationType(number))
        if shape[-1] % GGML_QUANT_SIZES[info.type][0]:
            raise _Unsound(f"the tensor {name} {shape} does not divide into blocks of {info.type.name}")
        return info, offset

    def _skip_value(self, kind: int) -> None:
        if kind == _Kind.STRING:
            self._skip(self._unpack("Q"))
        elif kind == _Kind.ARRAY:
            items, count = self._unpack("I"), self._unpack("Q")
            if items == _Kind.STRING:
                for _ in range(count):
                    self._skip(self._unpack("Q"))
            elif items in SCALARS:
                self._skip(count * struct.calcsize(f"<{SCALARS[items]}"))
            else:
                raise _Unsound(f"an array of type {items}")
        elif kind in SCALARS:
            self._skip(struct.calcsize(f"<{SCALARS[kind]}"))
        else:
            raise _Unsound(f"a value of type {kind}")

    def _text(self) -> str:
        length = self._unpack("Q")
        self._skip(length)
        return self._mapped[self._at - length : self._at].decode("utf-8")

    def _unpack(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self._mapped, self._at)
        self._at += struct.calcsize(f"<{code}")
        return int(value)

    def _skip(self, length: int) -> None:
        # Every loop above consumes bytes, so a claimed count can never outlast the file.
        if length > len(self._mapped) - self._at:
            raise _Unsound("it is cut short")
        self._at += length


def padding(length: int, alignment: int) -> int:
    return -length % alignment
