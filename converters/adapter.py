"""The common adapter layout that every format is read into and written from.

In memory an adapter is a mapping from module names, as PEFT and transformers name them
(`model.layers.0.self_attn.q_proj`), to low-rank factors in float32 with ΔW = B @ A. All scaling (alpha/r, rsLoRA,
MLX's scale) is folded into B on the way in, so the scaling of this layout is always 1.

On disk it is one safetensors file: `NAME.lora_A.weight` (r, in) and `NAME.lora_B.weight` (out, r), in float32,
bfloat16 or float16, with `format=oneround/1` in the header. Where A was frozen in training, at the value that it has in
another adapter, the file holds B alone, and `frozen_a` in its header is that adapter's SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converters import tensors
from oneround.errors import BadAdapter, LayoutMismatch

FORMAT = "oneround/1"
FROZEN_A = "frozen_a"
Factor = NDArray[np.float32]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": _FLOAT32,
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PANEL = 256  # columns of B that go into one product: enough for the full speed of a matrix product
_VOCABULARY = ("lm_head", "embed_tokens", "embed_out", "embed_in", "wte", "word_embeddings")


class Shape(NamedTuple):
    """The shape of an adapted linear layer's weight: (out, in)."""

    out: int
    into: int


class Term(NamedTuple):
    """One summand of an update, weight · b @ a, its factors as they lie in a file: mapped, in any wire dtype."""

    a: tensors.Array  # (r, in)
    b: tensors.Array  # (out, r)
    weight: float = 1.0

    def forget(self) -> None:
        """Give the pages of the mapped file back to the system; they are read again when needed."""
        tensors.forget(self.a)
        tensors.forget(self.b)


class LowRank:
    """One module's update, ΔW = Σ weight · b @ a over its terms.

    `LowRank(a, b)` has one term. Nothing is read or multiplied before it is asked for, so an update that is the mean of
    two hundred files costs no more memory than their names.
    """

    def __init__(self, a: tensors.Array, b: tensors.Array, weight: float = 1.0) -> None:
        self.terms: tuple[Term, ...] = (Term(a, b, weight),)

    @classmethod
    def sum(cls, updates: Iterable[LowRank], weights: Iterable[float]) -> LowRank:
        """Σ weight · ΔW, exactly: the terms of all. Ranks add up."""
        total = cls.__new__(cls)
        total.terms = tuple(
            term._replace(weight=term.weight * weight)
            for update, weight in zip(updates, weights, strict=True)
            for term in update.terms
        )
        return total

    @property
    def rank(self) -> int:
        return sum(int(term.a.shape[0]) for term in self.terms)

    @property
    def shape(self) -> Shape:
        return Shape(int(self.terms[0].b.shape[0]), int(self.terms[0].a.shape[1]))

    @property
    def a(self) -> Factor:
        """The terms' A, stacked: (Σr, in)."""
        return self._joined([_float32(term.a) for term in self.terms], axis=0)

    @property
    def b(self) -> Factor:
        """The terms' B, weighted and stacked: (out, Σr)."""
        return self._joined([_weighted(term.b, term.weight) for term in self.terms], axis=1)

    def _joined(self, factors: list[Factor], axis: int) -> Factor:
        joined = factors[0] if len(factors) == 1 else np.concatenate(factors, axis)
        if joined.flags.owndata:  # what was read has been copied
            self.forget()
        return joined

    def delta(self) -> Factor:
        """ΔW (out, in), dense."""
        out, into = self.shape
        return self.add_to(np.zeros((out, into), np.float32))

    def add_to(self, dense: Factor, rows: slice | NDArray[np.intp] = slice(None)) -> Factor:
        """Add these rows of ΔW to `dense` (rows, in), in place; returns it.

        Factors are taken up in panels of some hundred columns and their files' pages given back, so memory is flat in
        the number of terms and in rank.
        """
        for panel in self._panels():
            rank = sum(len(term.a) for term in panel)
            a, b = np.empty((rank, dense.shape[1]), np.float32), np.empty((dense.shape[0], rank), np.float32)
            at = 0
            for term in panel:
                columns = slice(at, at + len(term.a))
                a[columns] = term.a
                b[:, columns] = term.b[rows]
                b[:, columns] *= np.float32(term.weight)
                at = columns.stop
                term.forget()
            dense += b @ a
        return dense

    def _panels(self) -> Iterator[list[Term]]:
        """The terms, cut and grouped so that a group has about _PANEL columns of B."""
        panel: list[Term] = []
        for term in self.terms:
            for start in range(0, term.a.shape[0], _PANEL):
                panel.append(Term(term.a[start : start + _PANEL], term.b[:, start : start + _PANEL], term.weight))
                if sum(len(cut.a) for cut in panel) >= _PANEL:
                    yield panel
                    panel = []
        if panel:
            yield panel

    def later(self, dtype: np.dtype[Any] = _FLOAT32) -> tuple[tensors.Later, tensors.Later]:
        """A and B, rounded to a dtype when they are written."""
        (out, into), rank = self.shape, self.rank
        return (
            tensors.Later(dtype, (rank, into), lambda: self.a.astype(dtype, copy=False)),
            tensors.Later(dtype, (out, rank), lambda: self.b.astype(dtype, copy=False)),
        )

    def forget(self) -> None:
        """Give the pages of mapped files back to the system; they are read again when needed."""
        for term in self.terms:
            term.forget()


class LazyUpdates(Mapping[str, LowRank]):
    """Updates by module name, each made when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], LowRank]) -> None:
        self._names = dict.fromkeys(sorted(names))
        self._make = make

    def __getitem__(self, name: str) -> LowRank:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Adapter:
    """Factors by module name, and what is known of how they were made (strings, as in the file's header)."""

    modules: Mapping[str, LowRank]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: update.rank for name, update in self.modules.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: update.shape for name, update in self.modules.items()}


def read(path: Path, frozen: Adapter | None = None) -> Adapter:
    """Read an adapter in the common layout; factors stay on disk until they are asked for.

    A file that holds B alone is completed by the A of `frozen`; whether that is the adapter that it was trained over is
    for the caller to see.

    Raises:
        BadAdapter: not this layout, an unknown tensor name, a lone factor, or ranks that do not agree.
    """
    found, metadata = tensors.read(path)
    if metadata.get("format") != FORMAT:
        raise BadAdapter(
            f"{path} is not an adapter in the common layout: its header has no format={FORMAT}",
            hint="adapter-convert FOLDER OUT.safetensors --to canonical, with the folder that has its settings too",
        )
    for name in found:
        if not name.endswith((_A, _B)):
            raise BadAdapter(f"{path}: unknown tensor {name}; expected names that end in {_A} or {_B}")
    if FROZEN_A in metadata:
        return _completed(path, found, metadata, frozen)
    _check_pairs(_half(found, _A), _half(found, _B), path)
    names = [name.removesuffix(_A) for name in found if name.endswith(_A)]
    return Adapter(LazyUpdates(names, lambda name: LowRank(found[name + _A], found[name + _B])), metadata)


def _completed(
    path: Path, found: Mapping[str, tensors.Array], metadata: Mapping[str, str], frozen: Adapter | None
) -> Adapter:
    if alone := [name for name in found if name.endswith(_A)]:
        raise BadAdapter(f"{path} says that its A was frozen, and holds {alone[0]}")
    if frozen is None:
        raise BadAdapter(
            f"{path} holds B alone: its A was frozen, and is in the adapter with SHA-256 {metadata[FROZEN_A]}",
            hint="take the adapter that the coordinator has published",
        )
    b = _half(found, _B)
    if strange := sorted(b.keys() - frozen.modules.keys()):
        raise BadAdapter(f"{path}: {strange[0]} has no A: the adapter that was frozen does not adapt it")
    known = frozen.modules
    _check_pairs({name: known[name].terms[0].a for name in b}, b, path)
    return Adapter(LazyUpdates(b, lambda name: LowRank(known[name].terms[0].a, found[name + _B])), metadata)


def pair(
    a: Mapping[str, tensors.Array], b: Mapping[str, tensors.Array], path: Path
) -> dict[str, tuple[tensors.Array, tensors.Array]]:
    """Factors by module, from a reader's A (r, in) and B (out, r), checked.

    Raises:
        BadAdapter: a lone factor, one that is not a matrix of floats, ranks that do not agree, nothing at all, or a
            module that llama.cpp has no LoRA for.
    """
    _check_pairs(a, b, path)
    for name in a:
        if name.rsplit(".", 1)[-1] in _VOCABULARY:
            raise BadAdapter(f"{path}: {name} is adapted; LoRA on embeddings and output layers cannot be converted")
    return {name: (a[name], b[name]) for name in sorted(a)}


def write(adapter: Adapter, path: Path, dtype: str = "float32", frozen_a: str = "") -> None:
    """Write an adapter in the common layout, rounded to `dtype`; atomic and synced.

    B alone where `frozen_a`, the SHA-256 of an adapter's file, says where A is.
    """
    wire = WIRE_DTYPES[dtype]
    found: dict[str, tensors.Later] = {}
    for name, update in adapter.modules.items():
        a, found[name + _B] = update.later(wire)
        if not frozen_a:
            found[name + _A] = a
    said = {name: value for name, value in adapter.metadata.items() if name != FROZEN_A}
    if frozen_a:
        said[FROZEN_A] = frozen_a
    tensors.write(path, found, {**said, "format": FORMAT, "dtype": dtype})


def check(adapter: Adapter, expected: Mapping[str, Shape]) -> None:
    """Hold an adapter against the modules and shapes (out, in) that it has to adapt.

    Raises:
        LayoutMismatch: a module is missing, unknown, or of another shape.
        BadAdapter: a factor holds NaN or Inf.
    """
    missing = sorted(expected.keys() - adapter.modules.keys())
    if missing:
        raise LayoutMismatch(f"the adapter lacks {len(missing)} of the job's modules, {missing[0]} for one")
    unknown = sorted(adapter.modules.keys() - expected.keys())
    if unknown:
        raise LayoutMismatch(
            f"the adapter has {len(unknown)} modules that the job does not ask for, {unknown[0]} for one"
        )
    for name, update in adapter.modules.items():
        if update.shape != expected[name]:
            raise LayoutMismatch(f"{name} adapts a weight of shape {update.shape}, the base has {expected[name]}")
        for letter, factor in (("A", update.a), ("B", update.b)):
            if not np.isfinite(factor).all():
                raise BadAdapter(f"{name}: factor {letter} holds NaN or Inf")
        update.forget()


def initial(shapes: Mapping[str, Shape], rank: int, seed: int) -> Adapter:
    """The adapter that every client starts from: A uniform in ±1/√in, B zero, so that ΔW = 0.

    The same bound as PEFT's default (Kaiming uniform with a = √5). A shared A is what makes averaging of factors
    meaningful (formats differ, the seed does not).
    """
    rng = np.random.default_rng(seed)
    modules = {}
    for name, shape in sorted(shapes.items()):
        bound = 1.0 / np.sqrt(shape.into)
        a = rng.uniform(-bound, bound, (rank, shape.into)).astype(np.float32)
        modules[name] = LowRank(a, np.zeros((shape.out, rank), np.float32))
    return Adapter(modules)


def _half(found: Mapping[str, tensors.Array], suffix: str) -> dict[str, tensors.Array]:
    return {name.removesuffix(suffix): tensor for name, tensor in found.items() if name.endswith(suffix)}


def _float32(factor: tensors.Array) -> Factor:
    return factor.astype(np.float32, copy=False)


def _weighted(factor: tensors.Array, weight: float) -> Factor:
    return _float32(factor) if weight == 1.0 else _float32(factor) * np.float32(weight)


def _check_pairs(a: Mapping[str, tensors.Array], b: Mapping[str, tensors.Array], path: Path) -> None:
    if not a and not b:
        raise BadAdapter(f"{path} holds no tensors")
    if alone := sorted(a.keys() ^ b.keys()):
        raise BadAdapter(f"{path}: {alone[0]} has only one of its two factors")
    for name in a:
        for letter, factor in (("A", a[name]), ("B", b[name])):
            if factor.ndim != 2 or factor.dtype not in WIRE_DTYPES.values() or 0 in factor.shape:
                raise BadAdapter(f"{path}: {name}: {letter} is {factor.dtype} {factor.shape}, not a matrix of floats")
        if a[name].shape[0] != b[name].shape[1]:
            raise BadAdapter(f"{path}: {name}: A {a[name].shape} and B {b[name].shape} do not share a rank")
