"""Files by digest, and uploads on their way to become one.

A blob is in place whole and synced, or not at all. A partial upload is a file whose length is the committed offset;
its digest is checked over all of its bytes at the end, so a tail that a power cut damaged is found and sent again.
"""

from __future__ import annotations

import os
from pathlib import Path

from converters import tensors
from converters.errors import BadData
from oneround import stream


class Blobs:
    """A folder of blobs, and a folder of partial uploads beside it."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._uploads = folder / "uploads"
        for made in (self._blobs, self._uploads):
            made.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        assert stream.is_digest(digest), "checked where it came in"
        return self._blobs / digest

    def partial(self, job: str, client_id: str) -> Path:
        """Where a client's upload grows. Job names and client ids are checked where they come in."""
        return self._uploads / f"{job}.{client_id}"

    def committed(self, partial: Path, digest: str, size: int) -> int:
        """How many bytes of a declared upload are here."""
        if self.path(digest).exists():
            return size
        return partial.stat().st_size if partial.exists() else 0

    def adopt(self, file: Path) -> str:
        """Move a finished, synced file in under its digest; returns the digest."""
        digest = stream.digest(file)
        file.replace(self.path(digest))
        tensors.sync_folder(self._blobs)
        return digest

    def commit(self, partial: Path, digest: str) -> Path:
        """Sync a complete upload, check its digest, and put it in place.

        Raises:
            BadData: the bytes are not those that were declared; they are dropped.
        """
        blob = self.path(digest)
        if not partial.exists() and blob.exists():
            return blob
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        found = stream.digest(partial)
        if found != digest:
            partial.unlink()
            raise BadData(
                f"the upload's SHA-256 is {found}, and {digest} was declared; what came in was dropped",
                hint="edge-client join again, which sends it from the start",
            )
        partial.replace(blob)
        tensors.sync_folder(self._blobs)
        return blob
