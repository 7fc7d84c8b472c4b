"""What a crash leaves behind, and what a deleted job does: files that no row stands for, and how they go."""

from __future__ import annotations

import shutil
from pathlib import Path

import structlog

from coordinator.storage.blobs import Blobs
from coordinator.storage.people import People
from coordinator.storage.publications import clear_unfinished
from coordinator.storage.store import Store

log = structlog.get_logger()


def sweep(state: Path, known: Store, blobs: Blobs) -> None:
    """Finish deletions, and drop what nothing stands for: an upload or a blob whose row was never committed, and what
    a half-made publication left. Only before anything else is at work."""
    for name in known.deleted():
        delete(state, known, blobs, name)
    names = known.names()
    awaited = {
        (name, client.client_id)
        for name in names
        for client in known.clients(name)
        if not client.withdrawn and _may_send(known, name, client.client_id)
    }
    uploads = [file for file, job, client_id in blobs.partials() if (job, client_id) in awaited]
    orphans = blobs.sweep(known.digests(), uploads)
    for name in names:
        orphans += clear_unfinished(state, name, known.versions(name))
    for left_over in state.rglob(".*.partial"):
        left_over.unlink()
        orphans.append(left_over.name)
    if orphans:
        log.info("swept", files=len(orphans))


def _may_send(known: Store, job: str, client_id: str) -> bool:
    given = known.contribution(job, client_id)
    return given is None or given.may_replace


def delete(state: Path, known: Store, blobs: Blobs, name: str) -> None:
    """Drop the files and the rows of a job that is marked as deleted; killed at any instant, it can be done again."""
    shutil.rmtree(state / "publications" / name, ignore_errors=True)
    blobs.discard_all(name)
    People(known.database).forget(name)  # or the next job of this name would let the same clients in
    with blobs.changing:
        before = known.digests()
        known.forget(name)
        blobs.drop(before - known.digests())
