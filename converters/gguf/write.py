"""GGUF files, written one tensor at a time; keys are bytes, as `gguf_file` reads them.

Source: ggml/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from converters import tensors
from converters.gguf.file import SCALARS, Info, padding
from oneround import files
from oneround.errors import BadModel

_Kind = GGUFValueType


def write(path: Path, keys: Mapping[str, bytes], infos: Sequence[Info], data: Iterable[NDArray[Any]]) -> None:
    """Write a GGUF file; `data` yields what `infos` announces, in that order, each tensor in one piece or in several.

    Raises:
        NotEnough: the disk is full.
    """
    alignment = int.from_bytes(keys.get("general.alignment", b"")[4:], "little") or GGUF_DEFAULT_ALIGNMENT
    header = bytearray(struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(infos), len(keys)))
    for key, raw in keys.items():
        header += _string(key) + raw
    offset = 0
    for info in infos:
        header += _string(info.name) + struct.pack("<I", len(info.shape))
        header += struct.pack(f"<{len(info.shape)}QIQ", *reversed(info.shape), info.type, offset)
        offset += info.nbytes + padding(info.nbytes, alignment)
    pieces = iter(data)
    with files.placed(path) as file, _written_behind(file):
        file.write(header)
        file.write(bytes(padding(len(header), alignment)))
        for info in infos:
            left = info.nbytes
            while left:
                piece = np.ascontiguousarray(next(pieces)).reshape(-1).view(np.uint8)
                left -= piece.nbytes
                assert left >= 0, info
                file.write(piece.data)
                tensors.forget(piece)
            file.write(bytes(padding(info.nbytes, alignment)))
        assert next(pieces, None) is None, "more pieces than tensors"


@contextmanager
def _written_behind(file: BinaryIO) -> Iterator[None]:
    """Have the disk at work while the next tensors are made, so that little is left for the last sync to wait for."""
    done = threading.Event()

    def write_out() -> None:
        while not done.wait(0.1):
            with suppress(OSError):  # a full disk; the last sync will say so
                os.fsync(file.fileno())

    thread = threading.Thread(target=write_out, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def keys_of(writer: GGUFWriter) -> dict[str, bytes]:
    """The keys that a GGUFWriter was given, as they go into a file.

    Raises:
        BadModel: a value does not fit its type; they come from files that are not ours.
    """
    try:
        return {key: encode(field.value, field.type, field.sub_type) for key, field in writer.kv_data[0].items()}
    except (UnicodeEncodeError, struct.error) as error:
        raise BadModel(f"a value has no place in a GGUF file: {error}") from error


def encode(value: Any, kind: GGUFValueType, items: GGUFValueType | None = None) -> bytes:
    """A typed value's bytes; `items` is the type of an array's items, found from the first one when not given."""
    if kind == _Kind.STRING:
        body = _string(value)
    elif kind == _Kind.ARRAY:
        items = _Kind.get_type(value[0]) if items is None else items
        body = struct.pack("<IQ", items, len(value))
        if items == _Kind.STRING:
            body += b"".join(_string(item) for item in value)
        else:
            body += struct.pack(f"<{len(value)}{SCALARS[items]}", *value)
    else:
        body = struct.pack(f"<{SCALARS[kind]}", value)
    return struct.pack("<I", kind) + body


def _string(text: str | bytes) -> bytes:
    encoded = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded
