"""A version that the operator asks for: the job's spec with the request's values in their place, checked against the
contributions that are in."""

from __future__ import annotations

from converters.updates import kinds
from coordinator import aggregate
from coordinator.jobs import spec as jobs
from coordinator.storage.blobs import Blobs
from coordinator.storage.store import Store
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb


def asked(job: pb.JobSpec, request: pb.PublishRequest) -> pb.JobSpec:
    """The job's spec as this version is to have it, not checked yet.

    Parameters of the job's own method go where the requested method does not use them and the request does not set
    them.
    """
    spec = pb.JobSpec()
    spec.CopyFrom(job)
    spec.aggregate.MergeFrom(request.aggregate)
    if request.HasField("adapter_rank"):
        spec.publish.adapter_rank = request.adapter_rank
    method = aggregate.METHODS.get(spec.aggregate.method)
    used = {"server_learning_rate", *(method.parameters if method else ())}
    for name in aggregate.PARAMETERS.keys() - used:
        if not request.aggregate.HasField(name):  # type: ignore[arg-type]
            spec.aggregate.ClearField(name)  # type: ignore[arg-type]
    return spec


def check(spec: pb.JobSpec, store: Store, blobs: Blobs) -> pb.JobSpec:
    """The spec with every default filled in, if its method can take the contributions that are in; blocks.

    Raises:
        UsageError: the method or a parameter is invalid, or the method cannot take these contributions.
    """
    taking = [
        contribution
        for contribution in store.contributions(spec.name)
        if contribution.verdict in ("admitted", "clipped")
    ]
    spec = jobs.check(spec, clients=len(taking) or None)
    kind = kinds.kind_of(spec)
    if aggregate.METHODS[spec.aggregate.method].needs_one_rank and not kind.is_partial(spec):
        ranks = [kind.read(blobs.path(contribution.digest)).ranks for contribution in taking]
        one_rank, clients = all(other == ranks[0] for other in ranks), len(taking)
        if why := aggregate.unfit(spec.aggregate, clients=clients, kind=kind.MODULE, one_rank=one_rank, frozen_a=False):
            raise UsageError(why, hint="--method exact takes any")
    return spec
