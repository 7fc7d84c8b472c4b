"""Packages of Python's standard library as data: every machine has them, and no two machines need to share one."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_TOP_LEVEL = re.compile(r"^(?=class |def |async def |@)", flags=re.M)
_SHORTEST_ROW = 500  # characters; decorators and one-liners stay with what follows


def split(package: str, folder: Path, *, train_bytes: int, held_out_bytes: int) -> None:
    """A package's classes and functions as rows of train.jsonl and valid.jsonl, about so many bytes in each.

    Rows go in the order of their contents' hashes: a random split, and the same one on every run.
    """
    left = sorted(set(rows(package)), key=lambda row: hashlib.sha256(row.encode()).digest())
    folder.mkdir(parents=True)
    for name, size in (("valid", held_out_bytes), ("train", train_bytes)):
        taken: list[str] = []
        while left and sum(map(len, taken)) < size:
            taken.append(left.pop())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in taken))


def pool(folders: list[Path], to: Path) -> None:
    """Everybody's data in one folder."""
    to.mkdir(parents=True)
    for name in ("train.jsonl", "valid.jsonl"):
        (to / name).write_text("".join((folder / name).read_text() for folder in folders))


def rows(package: str) -> Iterator[str]:
    """A package's classes and functions."""
    source = Path(sysconfig.get_paths()["stdlib"]) / package
    for file in sorted(source.rglob("*.py")):
        yield from _cut(file.read_text("utf-8"))


def _cut(text: str) -> Iterator[str]:
    row = ""
    for part in _TOP_LEVEL.split(text):
        row += part
        if len(row) >= _SHORTEST_ROW:
            yield row
            row = ""
    if row.strip():
        yield row
