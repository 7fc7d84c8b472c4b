"""Runs `coordinator.publish` in a child process for a job whose round is closed, and reads what it made."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from converters import tensors
from converters.errors import BadData
from coordinator import base, store
from coordinator.blobs import Blobs
from coordinator.publish import Given, Order
from coordinator.store import Store
from oneround import stream
from oneround.v1 import federation_pb2 as pb

OnStage = Callable[[str], Awaitable[None]]


async def run(state: Path, known: Store, blobs: Blobs, name: str, on_stage: OnStage) -> store.Publication:
    """Make a job's publication. Cancelling it ends the child; running it again makes the same publication.

    Raises:
        BadData: the publisher failed, with its reason.
    """
    version = 1
    folder = state / "publications" / name / f"v{version}"
    order = await asyncio.to_thread(_order, state, known, blobs, name, version, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_name(f"{folder.name}.order.json")
    tensors.replace(written, [order.to_json().encode()])

    command = (sys.executable, "-m", "coordinator.publish", str(written))
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 20)
    assert child.stdout is not None, "asked for above"
    failed = "the publisher ended without a word; see the daemon's log"
    try:
        async for line in child.stdout:
            said = _said(line)
            if "failed" in said:
                failed = said["failed"]
            elif "stage" in said:
                await on_stage(said["stage"])
        if await child.wait() != 0:
            raise BadData(failed)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    listed = await asyncio.to_thread(_listed, folder, version)
    return store.Publication(job=name, version=version, publication=listed)


def _said(line: bytes) -> dict[str, str]:
    """A line of the publisher's; libraries that print to its output are not listened to."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _order(state: Path, known: Store, blobs: Blobs, name: str, version: int, folder: Path) -> Order:
    row = known.job(name)
    prepared = base.Prepared(
        folder=Path(row.base_folder),
        base=base.describe(row.job.spec.model, Path(row.base_folder), row.job.base_fingerprint, state / "bases"),
        files=list(row.job.base_files),
        fingerprint=row.job.base_fingerprint,
        revision=row.job.spec.model.revision,
    )
    names = {client.client_id: client.status.name for client in known.clients(name)}
    return Order(
        spec=row.job.spec,
        version=version,
        base_folder=prepared.folder,
        base_gguf=base.gguf(row.job.spec.model, prepared, state / "bases"),
        base_fingerprint=row.job.base_fingerprint,
        contributions=[
            Given(
                client=names[given.client_id],
                digest=given.declaration.digest,
                num_examples=given.declaration.num_examples,
                file=blobs.path(given.declaration.digest),
            )
            for given in known.contributions(name)
            if given.receipt.admitted
        ],
        folder=folder,
    )


def _listed(folder: Path, version: int) -> pb.Publication:
    """A publication as its manifest lists it, the manifest first."""
    manifest = folder / "manifest.json"
    artifacts = [pb.Artifact(name="manifest.json", digest=stream.digest(manifest), size=manifest.stat().st_size)]
    listed = json.loads(manifest.read_text())
    for name, file in listed["files"].items():
        artifacts.append(pb.Artifact(name=name, digest=file["sha256"], size=file["size"]))
    withheld = [pb.Withheld(name=name, reason=reason) for name, reason in listed["withheld"].items()]
    return pb.Publication(version=version, artifacts=artifacts, folder=str(folder), withheld=withheld)
