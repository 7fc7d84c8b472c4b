"""SentencePiece's tokenizer.model, read without the sentencepiece package: a protobuf message, little of it needed.

Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from gguf import TokenType

from oneround.errors import BadModel

_NORMAL, _BYTE = int(TokenType.NORMAL), int(TokenType.BYTE)


def pieces(path: Path) -> Iterator[tuple[str, float, int]]:
    """Pieces of a SentencePiece model in order: text, score, type (llama.cpp has taken over SentencePiece's numbers).

    Source: sentencepiece_model.proto; ModelProto.pieces is field 1, with piece = 1, score = 2, type = 3.
    """
    raw = path.read_bytes()
    try:
        for field, piece in _fields(raw):
            if field == 1 and isinstance(piece, bytes):
                parts = dict(_fields(piece))
                text, score, kind = parts.get(1, b""), parts.get(2, b"\0\0\0\0"), parts.get(3, _NORMAL)
                if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                    raise ValueError("a piece of another form")
                if not _NORMAL <= kind <= _BYTE:
                    raise ValueError(f"a piece of the unknown type {kind}")
                yield text.decode("utf-8"), struct.unpack("<f", score)[0], kind
    except (ValueError, IndexError, struct.error) as error:
        raise BadModel(f"{path} is not a SentencePiece model: {error}") from error


def prepends_space(path: Path) -> bool:
    """Whether a SentencePiece model puts a space before a text: NormalizerSpec, field 3, and its add_dummy_prefix, 3.

    Source: sentencepiece_model.proto, where it is true by default.
    """
    try:
        normalizer = dict(_fields(path.read_bytes())).get(3, b"")
        return bool(dict(_fields(normalizer)).get(3, 1)) if isinstance(normalizer, bytes) else True
    except (ValueError, IndexError) as error:
        raise BadModel(f"{path} is not a SentencePiece model: {error}") from error


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of a protobuf message: its number, and bytes or a varint."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 64:
            value |= (raw[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if raw[at - 1] < 0x80:
                return value
        raise ValueError("a number that does not end")

    while at < len(raw):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of wire type {kind}")
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if length > len(raw) - at:
            raise ValueError("it is cut short")
        yield tag >> 3, raw[at : at + length]
        at += length
