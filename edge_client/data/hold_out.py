"""Which rows are held out: by each row's content alone, so that the same ones are whatever is around them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from edge_client.data.kinds import Dialogue, Row, Text
from oneround.errors import BadData

_HELD_OUT = 0.1


def hold_out(rows: tuple[Row, ...]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(train, held out): at least one row on either side.

    Raises:
        BadData: there is too little to hold anything out.
    """
    if len(rows) == 1:
        return _cut(rows[0])
    shares = [_share(row) for row in rows]
    lowest, highest = min(shares), max(shares)
    held_out = [share < _HELD_OUT or share == lowest for share in shares]
    if all(held_out):
        held_out = [share < highest for share in shares]
    if not any(held_out):  # all rows are equal
        held_out[0] = True
    return (
        tuple(row for row, out in zip(rows, held_out, strict=True) if not out),
        tuple(row for row, out in zip(rows, held_out, strict=True) if out),
    )


def _share(row: Row) -> float:
    """A number in [0, 1) that depends on nothing but the row's content."""
    content = row.text if isinstance(row, Text) else [row.messages, row.tools]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _cut(row: Row) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """A lone text in two: nine tenths and the last one, within a twentieth of the text's length."""
    more = "add rows, or put a validation file beside it"
    if isinstance(row, Dialogue):
        raise BadData(f"{row.where}: the only example; at least two are needed, as one is held out", hint=more)
    low, middle, high = (int(len(row.text) * (1 - _HELD_OUT + by)) for by in (-0.05, 0, 0.05))
    ends = (row.text.rfind(mark, low, high) + len(mark) for mark in ("\n\n", "\n", " ") if mark in row.text[low:high])
    end = next(ends, middle)
    if not row.text[:end].strip() or not row.text[end:].strip():
        raise BadData(f"{row.where}: the text is too short to hold a tenth of it out", hint=more)
    return (replace(row, text=row.text[:end]),), (replace(row, text=row.text[end:]),)
