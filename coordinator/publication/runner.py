"""Runs publication/build.py in a child process for the version that a round is making, and reads what it made."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from coordinator.auth.signer import Signer
from coordinator.jobs import base_model
from coordinator.publication.build import BuildOrder, Candidate
from coordinator.storage.blobs import Blobs
from coordinator.storage.publications import version_folder
from coordinator.storage.store import Store
from oneround import files, statements, stream
from oneround.errors import BadData, NotEnough
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb

OnStage = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class BuiltVersion:
    """A version in its place, and what its cohort made of each contribution: verdict and reason by client id."""

    publication: pb.Publication
    findings: dict[str, tuple[str, str]]


async def run(state: Path, known: Store, blobs: Blobs, signer: Signer, name: str, on_stage: OnStage) -> BuiltVersion:
    """Make a job's next version, and sign it. Cancelling it ends the child; running it again makes the same version.

    Raises:
        NotEnough: there is no room for it on the disk.
        BadData: the publisher failed, with its reason.
    """
    order, clients = await asyncio.to_thread(_order, state, known, blobs, name)
    order.folder.parent.mkdir(parents=True, exist_ok=True)
    written = order.folder.with_name(f"{order.folder.name}.order.json")
    await asyncio.to_thread(files.replace, written, [order.to_json().encode()])

    command = (sys.executable, "-m", "coordinator.publication.build", str(written))
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 20)
    assert child.stdout is not None, "asked for above"
    failed, hint = "the publisher ended without a word; see the daemon's log", ""
    try:
        async for line in child.stdout:
            said = _said(line)
            if "failed" in said:
                failed, hint = said["failed"], said.get("hint", "")
            elif "stage" in said:
                await on_stage(said["stage"])
        code = await child.wait()
        if code == NotEnough.exit_code:
            raise NotEnough(failed)
        if code != 0:
            raise BadData(failed, hint=hint)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    made = await asyncio.to_thread(_made, order, clients, signer)
    written.unlink(missing_ok=True)
    return made


def _said(line: bytes) -> dict[str, str]:
    """A line of the publisher's; libraries that print to its output are not listened to."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _order(state: Path, known: Store, blobs: Blobs, name: str) -> tuple[BuildOrder, dict[str, str]]:
    """What to make, and the clients' ids by the ids that manifests have."""
    announced = known.announced(name)
    making = known.in_making(name)
    assert making is not None, "a round that publishes has a version in the making"
    row, candidates = making
    spec = pb.JobSpec()
    spec.CopyFrom(announced.job.spec)
    spec.aggregate.CopyFrom(row.request.aggregate)
    spec.publish.adapter_rank = row.request.adapter_rank
    prepared = base_model.PreparedBase(
        folder=Path(announced.base_folder),
        base=base_model.describe(
            spec.model, Path(announced.base_folder), announced.job.base_fingerprint, state / "bases"
        ),
        files=list(announced.job.base_files),
        fingerprint=announced.job.base_fingerprint,
        revision=spec.model.revision,
    )
    names = {client.client_id: client.name for client in known.clients(name)}
    taking = {given.client_id for given in candidates}
    order = BuildOrder(
        spec=spec,
        job_id=announced.job.id,
        version=row.version,
        reason=row.request.reason,
        at_least=row.at_least,
        base_folder=prepared.folder,
        base_gguf=base_model.gguf(spec.model, prepared, state / "bases"),
        base_fingerprint=announced.job.base_fingerprint,
        contributions=[
            Candidate(
                client=names[given.client_id],
                id=public_id(given.client_id),
                digest=given.digest,
                num_examples=given.declaration.num_examples,
                received=given.received,
                by_hand=given.by_hand == "admit",
                earlier=given.reason if given.verdict == "quarantined" else "",
                file=blobs.path(given.digest),
            )
            for given in candidates
        ],
        set_aside=[
            {
                "client": names[given.client_id],
                "id": public_id(given.client_id),
                "digest": given.digest,
                "num_examples": given.declaration.num_examples,
                "weight": 0.0,
                "verdict": given.verdict,
                "reason": given.reason,
            }
            for given in known.contributions(name)
            if given.client_id not in taking and given.considered == row.version
        ],
        folder=version_folder(state, name, row.version),
        initial=blobs.path(announced.job.initial.digest) if spec.lora.freeze_a or spec.lora.start_from else None,
        started_from=json_format.MessageToDict(announced.job.started_from, preserving_proto_field_name=True),
    )
    return order, {public_id(client_id): client_id for client_id in names}


def _made(order: BuildOrder, clients: dict[str, str], signer: Signer) -> BuiltVersion:
    """A version as its manifest lists it, the manifest and the signature over it first."""
    manifest = order.folder / statements.MANIFEST
    artifacts = [
        pb.Artifact(name=file.name, digest=stream.digest(file), size=file.stat().st_size)
        for file in (manifest, signer.manifest(order.folder))
    ]
    listed = json.loads(manifest.read_text())
    for name, file in listed["files"].items():
        artifacts.append(pb.Artifact(name=name, digest=file["sha256"], size=file["size"]))
    given = listed["contributions"]
    publication = pb.Publication(
        version=order.version,
        artifacts=artifacts,
        withheld=[pb.Withheld(name=name, reason=reason) for name, reason in listed["withheld"].items()],
        aggregate=order.spec.aggregate,
        contributions=sum(entry["weight"] > 0 for entry in given),
        reason=order.reason,
    )
    candidates = {one.id for one in order.contributions}
    findings = {
        clients[entry["id"]]: (entry["verdict"], entry["reason"]) for entry in given if entry["id"] in candidates
    }
    return BuiltVersion(publication, findings)
