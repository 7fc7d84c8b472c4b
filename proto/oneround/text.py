"""Text for people: sizes in words, and what others wrote made fit to be shown in a terminal and kept in a log."""

from __future__ import annotations

LONGEST_NAME = 64  # of a client or a coordinator, in letters


def human_size(count: float) -> str:
    """Bytes in powers of ten, as disks are sold: `7 B`, `2.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_memory(count: float) -> str:
    """Bytes as memory is sold: in GiB, which people call GB."""
    return f"{count / 2**30:.1f} GB"


def one_line(text: str, most: int = 500) -> str:
    """What a peer wrote, as part of a sentence of ours: one line of so many letters, none that a terminal obeys."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 2 * most]).split())
    return plain if len(plain) <= most else f"{plain[:most]} …"


def label(text: str, most: int = LONGEST_NAME) -> str:
    """A short text from a stranger, such as a name: its printable letters, at most so many."""
    return "".join(letter for letter in text if letter.isprintable())[:most].strip()


def printable(text: str) -> str:
    """Lines of text without what a terminal would obey or cannot show: names in them come from files of others."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def shown(value: object) -> str:
    """A value from a stranger's file for a message: short, whatever it is."""
    if value is None:
        return "absent"
    if isinstance(value, int) and value.bit_length() > 200:
        return "an enormous number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
