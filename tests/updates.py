"""A second kind of update, ΔW as it is, for the tests of the seam: what passes with this and with LoRA passes with any
kind. A module in the form of converters/updates/lora.py; its jobs borrow the table `[lora]`, which it does not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from converters import tensors
from converters.tensors import Array, Later
from converters.updates.update import (
    FLOAT32,
    WIRE_DTYPES,
    Factor,
    Floats,
    LazyUpdates,
    ModuleUpdate,
    Shape,
    Truncated,
    Update,
)
from oneround import rules
from oneround.errors import BadAdapter
from oneround.v1 import federation_pb2 as pb

END = ".delta"
ROWS = 64  # of ΔW that are in memory at a time


class Term(NamedTuple):
    delta: Array  # (out, in), mapped
    weight: float = 1.0


class Dense(ModuleUpdate):
    """Σ weight · ΔW over terms that stay in their files."""

    kind = "dense"

    def __init__(self, delta: Array, weight: float = 1.0) -> None:
        self.terms: tuple[Term, ...] = (Term(delta, weight),)

    @classmethod
    def sum(cls, updates: Iterable[Self], weights: Iterable[float]) -> Self:
        total = cls.__new__(cls)
        total.terms = tuple(
            Term(term.delta, term.weight * weight)
            for update, weight in zip(updates, weights, strict=True)
            for term in update.terms
        )
        return total

    @property
    def shape(self) -> Shape:
        return Shape(*self.terms[0].delta.shape)

    def add_to(self, dense: Factor, rows: Any = slice(None)) -> Factor:
        for term in self.terms:
            dense += np.float32(term.weight) * term.delta[rows].astype(np.float32)
            tensors.forget(term.delta)
        return dense

    def _panel(self, start: int) -> Floats:
        rows = slice(start, min(start + ROWS, self.shape.out))
        zeros = np.zeros((rows.stop - start, self.shape.into), np.float32)
        return self.add_to(zeros, rows).ravel().astype(np.float64)

    @classmethod
    def inner(cls, rows: Sequence[Self], columns: Sequence[Self] | None = None) -> Floats:
        others = rows if columns is None else columns
        products = np.zeros((len(rows), len(others)))
        for start in range(0, rows[0].shape.out, ROWS):
            for i, row in enumerate(rows):
                panel = row._panel(start)
                products[i] += [float(panel @ other._panel(start)) for other in others]
        return products

    @classmethod
    def nearest(cls, dense: Factor, rank: int) -> Truncated[Self]:
        energy = float(np.square(dense, dtype=np.float64).sum())
        return Truncated(cls(dense), energy, energy)

    def tensors(self, dtype: np.dtype[Any] = FLOAT32) -> dict[str, Later]:
        return {END: Later(dtype, self.shape, lambda: self.delta().astype(dtype))}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Array]) -> Self:
        return cls(stored[END])

    def forget(self) -> None:
        for term in self.terms:
            tensors.forget(term.delta)


MODULE: type[ModuleUpdate] = Dense
TENSORS = 1
STATISTICS: frozenset[str] = frozenset({"steps"})


def rules_of(spec: pb.JobSpec) -> list[rules.Rule]:
    return []


def rank(spec: pb.JobSpec) -> int:
    return 0


def is_partial(spec: pb.JobSpec) -> bool:
    return False


def is_linear(spec: pb.JobSpec) -> bool:
    return True


def announced(name: str, shape: Shape, spec: pb.JobSpec) -> pb.Module:
    return pb.Module(name=name, out_features=shape.out, in_features=shape.into)


def unfit(module: pb.Module, spec: pb.JobSpec) -> str:
    return ""


def elements(job: pb.Job, *, whole: bool = False) -> int:
    return sum(module.out_features * module.in_features for module in job.modules)


def initial(shapes: Mapping[str, Shape], spec: pb.JobSpec) -> Update[Dense]:
    return Update({name: Dense(np.zeros(shape, np.float32)) for name, shape in shapes.items()})


def read(path: Path, initial: Update[Dense] | None = None) -> Update[Dense]:
    stored, metadata = tensors.read(path)
    if metadata.get("format") != "dense/1":
        raise BadAdapter(f"{path} is not dense")
    for name in stored:
        if not name.endswith(END):
            raise BadAdapter(f"{path}: unknown tensor {name}")
        if stored[name].ndim != 2 or stored[name].dtype not in WIRE_DTYPES.values():
            raise BadAdapter(f"{path}: {name} is no matrix of floats")
    names = [name.removesuffix(END) for name in stored]
    return Update(LazyUpdates(names, lambda name: Dense(stored[name + END])), metadata)


def astray(update: Update[Dense], initial: str) -> str:
    return ""


def write(update: Update[Dense], path: Path, dtype: str = "float32", initial: str = "") -> None:
    laid_out = {
        name + end: tensor
        for name, module in update.modules.items()
        for end, tensor in module.tensors(WIRE_DTYPES[dtype]).items()
    }
    tensors.write(path, laid_out, {**update.metadata, "format": "dense/1"})
