"""What a job's clients begin with, where it is not a fresh adapter: what an earlier job published, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters import adapter, formats
from converters.adapter import Adapter, Shape
from converters.updates import kinds, lora
from coordinator.jobs.base_model import PreparedBase
from coordinator.storage.publications import version_folder
from coordinator.storage.store import Store
from oneround import rules, statements
from oneround.errors import BadAdapter, BadData, NotFound, UsageError
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class WarmStart:
    """Where an adapter lies, what job it is of, if of any, and the base that it was trained over, if that is known."""

    path: Path
    job: pb.Start
    base_fingerprint: str = ""


def find(spec: pb.JobSpec, state: Path, store: Store) -> WarmStart | None:
    """Where a job's start lies, found before anything large is read; None where it is a fresh adapter.

    Raises:
        UsageError: there is no such job, or it has published nothing.
        BadData: there is no such file.
    """
    where = kinds.settings(spec).start_from
    if not where:
        return None
    if not rules.is_job_name(where):
        path = Path(where).expanduser()
        if not path.exists():
            raise BadData(
                f"lora.start_from is {where}, and nothing is there",
                hint="a path on the coordinator's machine, relative to the job file; or an earlier job's name",
            )
        return WarmStart(path, pb.Start())
    try:
        earlier, publications = store.announced(where).job, store.publications(where)
    except NotFound:
        raise UsageError(
            f"lora.start_from is {where!r}, and there is no such job here",
            hint=f"coordinator jobs, to see which there are; a path has a / in it: ./{where}",
        ) from None
    if not publications:
        raise UsageError(
            f"job {where!r}, from which this one is to start, has published nothing yet",
            hint=f"coordinator show {where}; submit this job when that one is published",
        )
    version = publications[-1].version
    folder = version_folder(state, where, version)
    digests = {artifact.name: artifact.digest for artifact in publications[-1].artifacts}
    start = pb.Start(job=where, job_id=earlier.id, version=version, digest=digests[statements.MANIFEST])
    return WarmStart(folder / "peft", start, earlier.base_fingerprint)


def read(source: WarmStart, spec: pb.JobSpec, prepared: PreparedBase, shapes: Mapping[str, Shape]) -> Adapter:
    """The adapter, which has exactly the job's modules, shapes (out, in) and rank.

    Raises:
        UsageError: it is over another base, or of another rank.
        BadData: it cannot be read, or does not fit the job.
    """
    where = kinds.settings(spec).start_from
    if source.base_fingerprint and source.base_fingerprint != prepared.fingerprint:
        raise UsageError(
            f"job {where!r} has another base model than this one, so its adapter does not fit",
            hint=f"coordinator show {where} has its base; give this job the same model.base and model.revision",
        )
    try:
        start = formats.read(formats.recognise(source.path), prepared.base)
        if (base := start.metadata.get("base", prepared.fingerprint)) != prepared.fingerprint:
            raise BadAdapter(f"it was trained over base {base}, and this job's is {prepared.fingerprint}")
        adapter.check(start, shapes)
    except BadData as error:
        raise BadAdapter(
            f"this job cannot start from {where}: {error}",
            hint=error.hint or "an adapter over the same base, with the same lora.target_modules as this job",
        ) from error
    except OSError as error:
        raise BadData(f"this job cannot start from {where}: {error.strerror or error}") from error
    _check_rank(source.job, spec, start)
    return Adapter(start.modules)


def taken(source: WarmStart, initial: str) -> pb.Start:
    """What a job says of its start; `initial` is the SHA-256 of the adapter that its clients get."""
    if source.job.job:
        return source.job
    return pb.Start(digest=initial)


def _check_rank(earlier: pb.Start, spec: pb.JobSpec, start: Adapter) -> None:
    """Clients train every module in the job's rank, and no other."""
    wanted, where = kinds.kind_of(spec).rank(spec), kinds.settings(spec).start_from
    module, rank = max(start.ranks.items(), key=lambda item: abs(item[1] - wanted))
    if rank == wanted:
        return
    ranks = set(start.ranks.values())
    origin = f"version {earlier.version} of job {where!r}" if earlier.job else where
    hint = f"lora.rank = {rank} in this job" if len(ranks) == 1 and rank <= lora.MOST_RANK else ""
    if earlier.job and rank > wanted:
        hint = (
            f"coordinator publish {where} --adapter-rank {wanted}, then submit this job again; for rounds to come,"
            f' publish.adapter_rank = {wanted} in the job, or a method that keeps the rank, such as "fedavg"'
        )
    raise UsageError(
        f"{origin} has rank {rank} in {module}, and this job's lora.rank is {wanted}",
        hint=hint or "an adapter of one rank in all modules",
    )
