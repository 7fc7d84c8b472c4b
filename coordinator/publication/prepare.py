"""What the next version of a job is made of: the order for it, from what the store knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from google.protobuf import json_format

from converters.updates import kinds
from coordinator.jobs import base_model
from coordinator.jobs.base_model import PreparedBase
from coordinator.publication.order import BuildOrder, Candidate
from coordinator.storage.blobs import Blobs
from coordinator.storage.publications import version_folder
from coordinator.storage.rounds import JobRecord
from coordinator.storage.schema import Contribution, Publication
from coordinator.storage.store import Store
from oneround.manifest import ContributionEntry, StartedFrom
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb


def order(state: Path, store: Store, blobs: Blobs, name: str) -> tuple[BuildOrder, dict[str, str]]:
    """The order for the version that a job is making, and the clients' ids by the ids that manifests have; blocks."""
    record, in_making = store.announced(name), store.in_making(name)
    assert in_making is not None, "a round that publishes has a version in the making"
    publication, candidates = in_making
    spec = _spec(record, publication)
    base = _prepared_base(record, spec, state)
    names = {client.client_id: client.name for client in store.clients(name)}
    starts_from_file = kinds.needs_initial(spec)
    build_order = BuildOrder(
        spec=spec,
        job_id=record.job.id,
        version=publication.version,
        reason=publication.request.reason,
        at_least=publication.at_least,
        base_folder=base.folder,
        base_gguf=base_model.gguf(spec.model, base, state / "bases"),
        base_fingerprint=base.fingerprint,
        contributions=[_candidate(contribution, names, blobs) for contribution in candidates],
        set_aside=_set_aside(store, name, publication.version, {sent.client_id for sent in candidates}, names),
        folder=version_folder(state, name, publication.version),
        initial=blobs.path(record.job.initial.digest) if starts_from_file else None,
        started_from=StartedFrom(
            **json_format.MessageToDict(record.job.started_from, preserving_proto_field_name=True)
        ),
    )
    return build_order, {public_id(client_id): client_id for client_id in names}


def _spec(record: JobRecord, publication: Publication) -> pb.JobSpec:
    """The job's, with what this version was asked to do otherwise."""
    spec = pb.JobSpec()
    spec.CopyFrom(record.job.spec)
    spec.aggregate.CopyFrom(publication.request.aggregate)
    spec.publish.adapter_rank = publication.request.adapter_rank
    return spec


def _prepared_base(record: JobRecord, spec: pb.JobSpec, state: Path) -> PreparedBase:
    """The base as it was found when the job was opened."""
    folder, fingerprint = Path(record.base_folder), record.job.base_fingerprint
    return PreparedBase(
        folder=folder,
        base=base_model.describe(spec.model, folder, fingerprint, state / "bases"),
        files=list(record.job.base_files),
        fingerprint=fingerprint,
        revision=spec.model.revision,
    )


def _candidate(contribution: Contribution, names: Mapping[str, str], blobs: Blobs) -> Candidate:
    return Candidate(
        client=names[contribution.client_id],
        id=public_id(contribution.client_id),
        digest=contribution.digest,
        num_examples=contribution.declaration.num_examples,
        received=contribution.received,
        by_hand=contribution.by_hand == "admit",
        earlier=contribution.reason if contribution.verdict == "quarantined" else "",
        file=blobs.path(contribution.digest),
    )


def _set_aside(
    store: Store, job: str, version: int, candidates: Collection[str], names: Mapping[str, str]
) -> list[ContributionEntry]:
    """What this version takes note of without looking at it: unsound, excluded or withdrawn."""
    return [
        ContributionEntry(
            client=names[contribution.client_id],
            id=public_id(contribution.client_id),
            digest=contribution.digest,
            num_examples=contribution.declaration.num_examples,
            weight=0.0,
            verdict=contribution.verdict,
            reason=contribution.reason,
        )
        for contribution in store.contributions(job)
        if contribution.client_id not in candidates and contribution.considered == version
    ]
