"""Files by digest, and uploads on their way to become one.

A blob is in place whole and synced, or not at all. A partial upload is a file whose length is the committed offset;
its digest is checked over all of its bytes at the end, so a tail that a power cut damaged is found and sent again.

Blobs go through fsspec, so that a bucket that several machines share can take the place of the folder: `url` says where
they are. Uploads grow on this machine's disk either way.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from oneround import files, stream


class Blobs:
    """Blobs, and a folder of partial uploads."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url or str(folder / "blobs"))
        self._local = isinstance(self._fs, LocalFileSystem)
        self._fetched = folder / "fetched"  # copies of blobs that are elsewhere
        self.uploads = folder / "uploads"
        # Held while a blob gets its place and its row, and while blobs without a row are dropped.
        self.changing = threading.RLock()
        self._fs.makedirs(self._root, exist_ok=True)
        self.uploads.mkdir(parents=True, exist_ok=True)
        self._growing: dict[tuple[str, str], set[str]] = {}  # digests of partial uploads, by job and client
        for file in self.uploads.iterdir():
            if parts := re.fullmatch(r"(.+)\.([0-9a-f]{32})\.([0-9a-f]{64})", file.name):
                self._growing.setdefault((parts[1], parts[2]), set()).add(parts[3])

    def path(self, digest: str) -> Path:
        """A blob as a file on this machine, which nobody changes."""
        assert stream.is_digest(digest), "checked where it came in"
        if self._local:
            return Path(self._root) / digest
        copy = self._fetched / digest
        if not copy.exists():
            self._fetched.mkdir(exist_ok=True)
            partial = copy.with_suffix(".partial")
            self._fs.get_file(f"{self._root}/{digest}", str(partial))
            partial.replace(copy)
        return copy

    def put(self, file: Path, digest: str) -> None:
        """Give a synced file its place among the blobs; the file stays where it is."""
        assert stream.is_digest(digest), "checked where it came in"
        if self._local:
            with suppress(FileExistsError):
                os.link(file, Path(self._root) / digest)
            files.sync_folder(Path(self._root))
        elif not self._fs.exists(f"{self._root}/{digest}"):
            self._fs.put_file(str(file), f"{self._root}/{digest}.partial")
            self._fs.mv(f"{self._root}/{digest}.partial", f"{self._root}/{digest}")

    def adopt(self, file: Path) -> str:
        """Move a finished, synced file in under its digest; returns the digest."""
        digest = stream.digest(file)
        self.put(file, digest)
        file.unlink()
        return digest

    def partial(self, job: str, client_id: str, digest: str) -> Path:
        """Where an upload grows: what is there of another digest does not continue it. All three are checked where they
        come in."""
        self._growing.setdefault((job, client_id), set()).add(digest)
        return self.uploads / f"{job}.{client_id}.{digest}"

    def partials(self) -> Iterator[tuple[Path, str, str]]:
        """Every partial upload, with its job and client."""
        for (job, client_id), digests in list(self._growing.items()):
            for digest in list(digests):
                yield self.uploads / f"{job}.{client_id}.{digest}", job, client_id

    def committed(self, partial: Path) -> int:
        """How many bytes of an upload are here."""
        return partial.stat().st_size if partial.exists() else 0

    def discard(self, job: str, client_id: str, *, but: str = "") -> None:
        """Drop a client's partial uploads: committed, given up, or replaced by that of another digest."""
        digests = self._growing.get((job, client_id), set())
        for digest in digests - {but}:
            (self.uploads / f"{job}.{client_id}.{digest}").unlink(missing_ok=True)
        digests &= {but}
        if not digests:
            self._growing.pop((job, client_id), None)

    def drop(self, digests: Iterable[str]) -> None:
        """Drop blobs that no row stands for."""
        for digest in digests:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{digest}")

    def discard_all(self, job: str) -> None:
        """Drop every partial upload of a job."""
        for _, of, client_id in list(self.partials()):
            if of == job:
                self.discard(job, client_id)

    def sweep(self, digests: Collection[str], uploads: Collection[Path]) -> list[str]:
        """Drop every blob and every upload that nothing stands for, before anything else is at work; returns names."""
        names = [entry.rsplit("/", 1)[-1] for entry in self._fs.ls(self._root, detail=False)]
        orphans = [name for name in names if name not in digests]
        self.drop(orphans)
        for upload in self.uploads.iterdir():
            if upload not in uploads:
                upload.unlink()
                orphans.append(upload.name)
        shutil.rmtree(self._fetched, ignore_errors=True)
        return orphans
