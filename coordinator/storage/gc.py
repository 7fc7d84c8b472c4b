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


def sweep(state: Path, store: Store, blobs: Blobs) -> None:
    """Finish deletions, and drop what nothing stands for: an upload or a blob whose row was never committed, and what
    a half-made publication left. Only before anything else is at work."""
    for name in store.deleted():
        delete(state, store, blobs, name)
    names = store.names()
    awaited = {
        (name, client.client_id)
        for name in names
        for client in store.clients(name)
        if not client.withdrawn and _may_send(store, name, client.client_id)
    }
    uploads = [file for file, job, client_id in blobs.partials() if (job, client_id) in awaited]
    orphans = blobs.sweep(store.digests(), uploads)
    for name in names:
        orphans += clear_unfinished(state, name, store.versions(name))
    for left_over in state.rglob(".*.partial"):
        left_over.unlink()
        orphans.append(left_over.name)
    if orphans:
        log.info("swept", files=len(orphans))


def _may_send(store: Store, job: str, client_id: str) -> bool:
    contribution = store.contribution(job, client_id)
    return contribution is None or contribution.may_replace


def delete(state: Path, store: Store, blobs: Blobs, name: str) -> None:
    """Drop the files and the rows of a job that is marked as deleted; killed at any instant, it can be done again."""
    shutil.rmtree(state / "publications" / name, ignore_errors=True)
    blobs.discard_all(name)
    People(store.database).forget(name)  # or the next job of this name would let the same clients in
    with blobs.changing:
        before = store.digests()
        store.forget(name)
        blobs.drop(before - store.digests())
