"""From a checked spec to an open round: the base found and fingerprinted, the initial update made or taken from where
the job starts, the row written."""

from __future__ import annotations

import secrets
from pathlib import Path

from converters import architectures, checkpoint
from converters.updates import kinds
from coordinator.jobs import base_model, warm_start
from coordinator.jobs import spec as jobs
from coordinator.round import State
from coordinator.storage.blobs import Blobs
from coordinator.storage.schema import Job
from coordinator.storage.store import Store
from oneround.v1 import federation_pb2 as pb


def open_round(spec: pb.JobSpec, state: Path, blobs: Blobs, store: Store, now: float) -> None:
    """Prepare a job and write it down. Takes minutes for a large base, which is read, and turned into a GGUF once.

    Raises:
        BadModel: the base is not there, or of a family for which there is no way to a GGUF.
        UsageError, BadData: what it is to start from is not there, or does not fit; see warm_start.py.
    """
    source = warm_start.find(spec, state, store)
    prepared = base_model.prepare(spec.model, state / "bases")
    if prepared.revision:
        spec.model.revision = prepared.revision
    kind, shapes = kinds.kind_of(spec), architectures.adapted(prepared.base, kinds.settings(spec).target_modules)
    base_model.gguf(spec.model, prepared, state / "bases")

    initial = blobs.uploads / f"{spec.name}.initial"
    kind.write(warm_start.read(source, spec, prepared, shapes) if source else kind.initial(shapes, spec), initial)
    size = initial.stat().st_size
    with blobs.changing:
        announced = pb.Job(
            spec=spec,
            modules=[kind.announced(name, shape, spec) for name, shape in sorted(shapes.items())],
            initial=pb.Artifact(name="initial.safetensors", digest=blobs.adopt(initial), size=size),
            base_files=prepared.files,
            base_fingerprint=prepared.fingerprint,
            deadline_unix=now + jobs.seconds(spec.round.deadline),
            id=secrets.token_hex(16),
            tokenizer=checkpoint.tokenizer_digest(prepared.folder),
            chat_template=checkpoint.chat_template_digest(prepared.folder),
        )
        if source:
            announced.started_from.CopyFrom(warm_start.taken(source, announced.initial.digest))
        store.add_job(
            Job(
                name=spec.name,
                job=announced,
                base_folder=str(prepared.folder),
                opened=now,
                state=State.OPEN.value,
                reason="",
                closed_at=None,
                tried_at=0.0,
                deleted=False,
            )
        )
