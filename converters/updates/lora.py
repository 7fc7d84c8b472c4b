"""The update kind of jobs with a `[lora]` table: factors A and B of every module; B alone where A is frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from converters import adapter
from converters.updates.low_rank import LowRank
from converters.updates.update import ModuleUpdate, Shape, Update
from oneround import rules
from oneround.v1 import federation_pb2 as pb

MODULE: type[ModuleUpdate] = LowRank
TENSORS = 2
STATISTICS: frozenset[str] = frozenset()
MOST_RANK = 1024


def rules_of(spec: pb.JobSpec) -> list[rules.Rule]:
    lora = spec.lora
    return [
        ("lora.rank", 1 <= lora.rank <= MOST_RANK, f"1 to {MOST_RANK}"),
        ("lora.alpha", 0 < lora.alpha < 1e6, "more than 0"),
        ("lora.dropout", 0 <= lora.dropout < 1, "0 or more and less than 1"),
        ("lora.target_modules", len(lora.target_modules) <= 4096, "at most 4096 names"),
        ("lora.target_modules", all(re.fullmatch(rules.MODULE_NAME, name) for name in lora.target_modules), "names"),
        ("lora.start_from", rules.is_start(lora.start_from), "the name of an earlier job, or a path with a / in it"),
    ]


def rank(spec: pb.JobSpec) -> int:
    return spec.lora.rank


def is_partial(spec: pb.JobSpec) -> bool:
    return spec.lora.freeze_a


def is_linear(spec: pb.JobSpec) -> bool:
    """Σ pᵢ Bᵢ A = (Σ pᵢ Bᵢ) A where A is one that nobody trains; a product of two trained factors is not linear."""
    return spec.lora.freeze_a


def announced(name: str, shape: Shape, spec: pb.JobSpec) -> pb.Module:
    low_rank = pb.LowRankModule(rank=spec.lora.rank)
    return pb.Module(name=name, out_features=shape.out, in_features=shape.into, low_rank=low_rank)


def unfit(module: pb.Module, spec: pb.JobSpec) -> str:
    """Coordinators from before `Module.tuned` say nothing, and mean the job's rank."""
    case = module.WhichOneof("tuned")
    if case is not None and module.low_rank.rank != spec.lora.rank:
        return f"{module.name} is of rank {module.low_rank.rank}, and lora.rank is {spec.lora.rank}"
    return ""


def elements(job: pb.Job, *, whole: bool = False) -> int:
    """Of A (r, in), unless it is frozen, and B (out, r) of every module."""
    sends_a = whole or not is_partial(job.spec)
    return job.spec.lora.rank * sum(
        module.out_features + (module.in_features if sends_a else 0) for module in job.modules
    )


def initial(shapes: Mapping[str, Shape], spec: pb.JobSpec) -> Update[LowRank]:
    return adapter.initial(shapes, spec.lora.rank, spec.train.seed)


def read(path: Path, initial: Update[LowRank] | None = None) -> Update[LowRank]:
    return adapter.read(path, initial)


def astray(update: Update[LowRank], initial: str) -> str:
    if update.metadata.get(adapter.FROZEN_A) != initial:
        return f"A is frozen in this job: only B is taken, with {adapter.FROZEN_A}={initial} in its header"
    return ""


def write(update: Update[LowRank], path: Path, dtype: str = "float32", initial: str = "") -> None:
    adapter.write(update, path, dtype, initial)
