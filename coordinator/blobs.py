"""Files by digest, and uploads on their way to become one.

A blob is in place whole and synced, or not at all. A partial upload is a file whose length is the committed offset;
its digest is checked over all of its bytes at the end, so a tail that a power cut damaged is found and sent again.
"""

from __future__ import annotations

import os
from contextlib import suppress
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

    def committed(self, partial: Path) -> int:
        """How many bytes of an upload are here."""
        return partial.stat().st_size if partial.exists() else 0

    def adopt(self, file: Path) -> str:
        """Move a finished, synced file in under its digest; returns the digest."""
        digest = stream.digest(file)
        file.replace(self.path(digest))
        tensors.sync_folder(self._blobs)
        return digest

    def commit(self, partial: Path, digest: str) -> Path:
        """Sync a complete upload, check its digest, and give it its place; the partial file stays until `discard`.

        So if the process dies before the contribution's row is committed, the whole upload is still there.

        Raises:
            BadData: the bytes are not those that were declared; they are dropped.
        """
        with partial.open("rb+") as file:
            tensors.sync(file)
        found = stream.digest(partial)
        if found != digest:
            partial.unlink()
            raise BadData(
                f"the upload's SHA-256 is {found}, and {digest} was declared; what came in was dropped",
                hint="edge-client join again, which sends it from the start",
            )
        blob = self.path(digest)
        with suppress(FileExistsError):
            os.link(partial, blob)
        tensors.sync_folder(self._blobs)
        return blob

    def discard(self, partial: Path) -> None:
        """Drop a partial upload that is committed, or that another one replaces."""
        partial.unlink(missing_ok=True)
