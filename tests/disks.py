"""File systems so small that they fill up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

INODES = 200


@contextmanager
def disk(folder: Path, megabytes: int = 32) -> Iterator[Path]:
    """A file system of its own at a folder."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounts a small file system, which takes Linux and root")
    folder.mkdir()
    options = f"size={megabytes}m,nr_inodes={INODES}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "oneround-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder: Path, *, but: int = 0) -> Iterator[None]:
    """No room but for so many bytes."""
    filler = folder / "filler"
    filler.write_bytes(bytes(max(shutil.disk_usage(folder).free - but, 0)))
    assert shutil.disk_usage(folder).free <= but
    try:
        yield
    finally:
        filler.unlink()
