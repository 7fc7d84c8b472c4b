"""Packages of Python's standard library as data: every machine has them, and no two machines need to share one."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path


def split(package: str, folder: Path, *, train_bytes: int, held_out_bytes: int) -> None:
    """A package's source as train.jsonl and valid.jsonl of at most so many bytes; whole files in each.

    Files go in the order of their names' hashes, so a run on the same version of Python gives the same split.
    """
    source = Path(sysconfig.get_paths()["stdlib"]) / package
    files = sorted(file for file in source.rglob("*.py") if file.stat().st_size > 500)
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(source).as_posix().encode()).digest())
    train: list[str] = []
    valid: list[str] = []
    for file in files:
        text = file.read_text("utf-8")
        if sum(map(len, valid)) + len(text) <= held_out_bytes:
            valid.append(text)
        elif sum(map(len, train)) + len(text) <= train_bytes:
            train.append(text)
    folder.mkdir(parents=True)
    for name, texts in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def pool(folders: list[Path], to: Path) -> None:
    """Everybody's data in one folder."""
    to.mkdir(parents=True)
    for name in ("train.jsonl", "valid.jsonl"):
        (to / name).write_text("".join((folder / name).read_text() for folder in folders))
