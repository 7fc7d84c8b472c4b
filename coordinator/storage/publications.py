"""The folders of publications: where a version stands, and dropping what was left half made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path


def version_folder(state: Path, name: str, version: int) -> Path:
    """Where a version of a job stands."""
    return state / "publications" / name / f"v{version}"


def clear_unfinished(state: Path, name: str, versions: Collection[int]) -> list[str]:
    """Drop what a publisher left of versions that are not there, and all that is half made; returns the names."""
    dropped: list[str] = []
    place = state / "publications" / name
    for left_over in place.iterdir() if place.is_dir() else ():
        parts = re.fullmatch(r"v(\d+)(\.partial|\.order\.json|\.withheld|\.failed)?", left_over.name)
        if not parts or (int(parts[1]) in versions and parts[2] != ".partial") or parts[2] == ".failed":
            continue
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()
        dropped.append(left_over.name)
    return dropped
