"""Runs publication/build.py in a child process for the version that a round is making, and reads what it made."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.auth.signer import Signer
from coordinator.publication import prepare
from coordinator.publication.order import BuildOrder
from coordinator.storage.blobs import Blobs
from coordinator.storage.store import Store
from oneround import files, manifest, statements, stream
from oneround.errors import BadData, NotEnough
from oneround.manifest import Manifest
from oneround.v1 import federation_pb2 as pb

OnStage = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class BuiltVersion:
    """A version in its place, and what its cohort made of each contribution: verdict and reason by client id."""

    publication: pb.Publication
    findings: dict[str, tuple[str, str]]


async def run(state: Path, store: Store, blobs: Blobs, signer: Signer, name: str, on_stage: OnStage) -> BuiltVersion:
    """Make a job's next version, and sign it. If it is cancelled the child ends; run again it makes the same version.

    Raises:
        NotEnough: there is no room for it on the disk.
        BadData: the child failed, with its reason.
    """
    order, client_ids = await asyncio.to_thread(prepare.order, state, store, blobs, name)
    order.folder.parent.mkdir(parents=True, exist_ok=True)
    file = order.beside(".order.json")
    await asyncio.to_thread(files.replace, file, [order.to_json().encode()])
    await _build(file, on_stage)
    built = await asyncio.to_thread(_built, order, client_ids, signer)
    file.unlink(missing_ok=True)
    return built


async def _build(order: Path, on_stage: OnStage) -> None:
    """Have a child carry an order out, and pass on what it says it is doing."""
    failed, hint = "the publisher ended without a word; see the daemon's log", ""
    async with _child(order) as child:
        assert child.stdout is not None, "a pipe, as _child asks for"
        async for line in child.stdout:
            message = _message(line)
            if "failed" in message:
                failed, hint = message["failed"], message.get("hint", "")
            elif "stage" in message:
                await on_stage(message["stage"])
        code = await child.wait()
    if code == NotEnough.exit_code:
        raise NotEnough(failed)
    if code != 0:
        raise BadData(failed, hint=hint)


@asynccontextmanager
async def _child(order: Path) -> AsyncIterator[Process]:
    """A process that builds, killed if it is still at work when the block ends. It ends by itself with its parent."""
    command = (sys.executable, "-m", "coordinator.publication.build", str(order))
    child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=1 << 20)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def _message(line: bytes) -> dict[str, str]:
    """A line that the child wrote; what libraries print to its output is passed over."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _built(order: BuildOrder, client_ids: Mapping[str, str], signer: Signer) -> BuiltVersion:
    """A version as its manifest lists it, signed."""
    listed = manifest.open_file(order.folder / statements.MANIFEST)
    candidates = {candidate.id for candidate in order.contributions}
    publication = pb.Publication(
        version=order.version,
        artifacts=_artifacts(order.folder, listed, signer),
        withheld=[pb.Withheld(name=name, reason=reason) for name, reason in listed.withheld.items()],
        aggregate=order.spec.aggregate,
        contributions=sum(entry.weight > 0 for entry in listed.contributions),
        reason=order.reason,
    )
    findings = {
        client_ids[entry.id]: (entry.verdict, entry.reason) for entry in listed.contributions if entry.id in candidates
    }
    return BuiltVersion(publication, findings)


def _artifacts(folder: Path, listed: Manifest, signer: Signer) -> list[pb.Artifact]:
    """The files of a publication, the manifest and the signature over it first."""
    signed = [folder / statements.MANIFEST, signer.manifest(folder)]
    return [
        *(pb.Artifact(name=file.name, digest=stream.digest(file), size=file.stat().st_size) for file in signed),
        *(pb.Artifact(name=name, digest=entry.sha256, size=entry.size) for name, entry in listed.files.items()),
    ]
