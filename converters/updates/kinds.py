"""Which kinds of update a job can ask for, and what each has to know of a job.

A kind is a module that has the names below; `lora.py` is the first. Its name is that of its table in a job file, which
is a case of the oneof `update` in JobSpec.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from converters.updates import lora
from converters.updates.update import ModuleUpdate, Shape, Update, check
from oneround import rules
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb

DEFAULT = "lora"  # of a job that names none


class UpdateKind(Protocol):
    """What a kind's module gives. A job file's table of every kind has `target_modules` and `start_from`."""

    MODULE: type[ModuleUpdate]  # what each of its modules is
    TENSORS: int  # that a module has in a file, at most
    STATISTICS: frozenset[str]  # that clients can gather beside it, for methods that ask for them (Method.statistics)

    def rules_of(self, spec: pb.JobSpec) -> list[rules.Rule]:
        """What the kind's table in a job may say; both ends hold a job to it."""

    def rank(self, spec: pb.JobSpec) -> int:
        """That every module has; 0 where the kind has none."""

    def is_partial(self, spec: pb.JobSpec) -> bool:
        """Whether clients train and send a part, and the rest is in the initial update, as it was."""

    def is_linear(self, spec: pb.JobSpec) -> bool:
        """Whether ΔW is linear in what clients send, so that a sum of what was sent tells the sum of ΔW."""

    def announced(self, name: str, shape: Shape, spec: pb.JobSpec) -> pb.Module:
        """A module as clients are told of it."""

    def unfit(self, module: pb.Module, spec: pb.JobSpec) -> str:
        """Why a module that was announced does not go with the job; empty if it does. Its name, its shape and the case
        of `tuned` have been looked at."""

    def elements(self, job: pb.Job, *, whole: bool = False) -> int:
        """Numbers that are trained and sent; with what is not sent, those of a `whole` update."""

    def initial(self, shapes: Mapping[str, Shape], spec: pb.JobSpec) -> Update[Any]:
        """What all clients start from: ΔW = 0, the same whenever it is made."""

    def read(self, path: Path, initial: Update[Any] | None = None) -> Update[Any]:
        """An update from its file, its tensors still there; `initial` has what a partial one lacks.

        Raises:
            BadData: it is not sound: names, dtypes or shapes are not those of the kind, or something is missing.
        """

    def astray(self, update: Update[Any], initial: str) -> str:
        """Why a partial update does not go with the initial update whose file has this SHA-256; empty if it does."""

    def write(self, update: Update[Any], path: Path, dtype: str = "float32", initial: str = "") -> None:
        """Write an update, rounded to a dtype of WIRE_DTYPES; atomic and synced. Where the kind is partial and
        `initial` is the SHA-256 of the initial update's file, what was trained alone.

        Raises:
            NotEnough: the disk is full.
        """


KINDS: dict[str, UpdateKind] = {"lora": lora}
MODULES: dict[str, type[ModuleUpdate]] = {"low_rank": lora.MODULE}  # by the cases of `tuned` in Module


def name_of(spec: pb.JobSpec) -> str:
    """The kind's name, which is that of its table."""
    return spec.WhichOneof("update") or DEFAULT


def kind_of(spec: pb.JobSpec) -> UpdateKind:
    """The kind that a job asks for."""
    return KINDS[name_of(spec)]


def settings(spec: pb.JobSpec) -> pb.LoraSpec:
    """The kind's table in a job; what is set in it is set in the job."""
    table: pb.LoraSpec = getattr(spec, name_of(spec))
    return table


def shapes(modules: Iterable[pb.Module]) -> dict[str, Shape]:
    """Shapes of weights (out, in), by module name."""
    return {module.name: Shape(module.out_features, module.in_features) for module in modules}


def needs_initial(spec: pb.JobSpec) -> bool:
    """Whether nothing can be made of a contribution without the job's initial update: it completes a partial one, and
    what was changed is the difference to it where it is not zero."""
    return kind_of(spec).is_partial(spec) or bool(settings(spec).start_from)


def frozen(spec: pb.JobSpec, initial: Path | None) -> Update[Any] | None:
    """The job's initial update where partial ones are completed by it: what `UpdateKind.read` wants beside a file."""
    kind = kind_of(spec)
    return kind.read(initial) if initial and kind.is_partial(spec) else None


def read_initial(path: Path, job: pb.Job) -> Update[Any]:
    """What a client starts from, as it came from the coordinator.

    Raises:
        BadData: it is not what the job says.
    """
    kind = kind_of(job.spec)
    update, rank = kind.read(path), kind.rank(job.spec)
    if set(update.ranks.values()) != {rank}:
        raise BadData(f"the coordinator's initial adapter is not of rank {rank}, as its job says")
    check(update, shapes(job.modules))
    return update


def unannounced(job: pb.Job) -> str:
    """Why a job's modules cannot be trained here; empty if they can. A newer coordinator may know more kinds."""
    known_here = job.spec.WhichOneof("update")
    if known_here is None:
        return "it asks for a kind of update that this version does not know"
    kind = kind_of(job.spec)
    for module in job.modules:
        case = module.WhichOneof("tuned")
        if case is not None and MODULES[case] is not kind.MODULE:
            return f"{module.name} is tuned as {case.replace('_', ' ')}, and the job is about {known_here}"
        if reason := kind.unfit(module, job.spec):
            return reason
    return ""
