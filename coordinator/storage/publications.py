"""The folders of publications: where a version stands, and what is dropped of versions that were not finished."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

# A version's folder, or what stands beside it: where it is made, the order for it, and what was not released.
_OF_VERSION = re.compile(r"v(?P<version>\d+)(?P<suffix>\.partial|\.order\.json|\.withheld|\.failed)?")


def version_folder(state: Path, name: str, version: int) -> Path:
    """Where a version of a job stands."""
    return state / "publications" / name / f"v{version}"


def clear_unfinished(state: Path, name: str, versions: Collection[int]) -> list[str]:
    """Drop what is left of a job's versions other than these, and all that is half made; returns the names.

    What failed is kept for the operator to look at.
    """
    dropped: list[str] = []
    folder = state / "publications" / name
    for left_over in folder.iterdir() if folder.is_dir() else ():
        match = _OF_VERSION.fullmatch(left_over.name)
        if match is None or match["suffix"] == ".failed":
            continue
        if int(match["version"]) in versions and match["suffix"] != ".partial":
            continue
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()
        dropped.append(left_over.name)
    return dropped
