"""Damaged copies of files, and whether they are refused as such."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from hypothesis import strategies as st

from oneround.errors import BadData

EXTREMES = [0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


NAMES = [b"../../etc/passwd", b"/dev/zero", b"..", b"a\\u0000b", b"model.layers.0.self_attn.q_proj" * 9, b"\xff\xfe"]


def mutations(raw: bytes, header: int, count: int) -> Iterator[bytes]:
    """`count` damaged copies, most of them in the first `header` bytes; the same for the same file."""
    rng = np.random.default_rng(0)

    def somewhere(most: int = 0) -> int:
        return int(rng.integers(max((header if rng.random() < 0.9 else len(raw)) - most, 1)))

    def cut() -> bytes:
        return raw[: somewhere()]

    def flipped() -> bytes:
        changed = bytearray(raw)
        for _ in range(int(rng.integers(1, 4))):
            changed[somewhere()] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    def extreme() -> bytes:
        at, size = somewhere(8), int(rng.choice([4, 8]))
        value = int(rng.choice(len(EXTREMES)))
        return raw[:at] + (EXTREMES[value] % 2 ** (8 * size)).to_bytes(size, "little") + raw[at + size :]

    def number() -> bytes:
        """A number in JSON becomes another."""
        found = [match.span() for match in re.finditer(rb"-?\d+(\.\d+)?", raw[:header])]
        start, stop = found[int(rng.integers(len(found)))] if found else (0, 0)
        values = [str(EXTREMES[int(rng.integers(len(EXTREMES)))]), "-1", "1e999", "NaN", "null", "[]", '"x"', "9" * 400]
        return raw[:start] + values[int(rng.integers(len(values)))].encode() + raw[stop:]

    def renamed() -> bytes:
        """A name becomes a path, is too long, or no text."""
        found = [match.span(1) for match in re.finditer(rb'"([^"\\]{1,200})"', raw[:header])]
        start, stop = found[int(rng.integers(len(found)))] if found else (somewhere(), somewhere())
        return raw[:start] + NAMES[int(rng.integers(len(NAMES)))] + raw[max(start, stop) :]

    def swapped() -> bytes:
        a, b, length = somewhere(64), somewhere(64), int(rng.integers(1, 64))
        changed = bytearray(raw)
        changed[a : a + length], changed[b : b + length] = raw[b : b + length], raw[a : a + length]
        return bytes(changed)

    def doubled() -> bytes:
        at, length = somewhere(64), int(rng.integers(1, 64))
        return raw[: at + length] + raw[at:]

    def left_out() -> bytes:
        at, length = somewhere(64), int(rng.integers(1, 64))
        return raw[:at] + raw[at + length :]

    ways = [cut, flipped, extreme, number, renamed, swapped, doubled, left_out]
    for n in range(count):
        yield ways[n % len(ways)]()


def survives(read: Callable[[], object]) -> bool:
    """True when the file was read after all: a flipped bit can fall where any value is sound."""
    try:
        read()
    except BadData as error:
        assert str(error)
        return False
    return True


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
