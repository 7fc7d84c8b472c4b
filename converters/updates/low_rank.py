"""Low-rank updates: ΔW = B A, as LoRA trains them, and sums of those. No method but `add_to` and `delta` forms ΔW."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from converters.tensors import Array, Later, forget
from converters.updates import truncate
from converters.updates.update import FLOAT32, Factor, Floats, ModuleUpdate, Shape, Truncated

A, B = ".lora_A.weight", ".lora_B.weight"  # what the tensors' names end in
_PANEL = 256  # columns of B that go into one product: enough for the full speed of a matrix product
_BATCH = 128  # columns of B, of several updates, whose inner products are taken at a time
_NOTHING = 1e-9  # a weight that is left when those of a cohort, which are shares, have cancelled

_Indices = NDArray[np.intp]


class Term(NamedTuple):
    """One summand of an update, weight · b @ a, its factors as they lie in a file: mapped, in any wire dtype."""

    a: Array  # (r, in)
    b: Array  # (out, r)
    weight: float = 1.0

    def forget(self) -> None:
        """Give the pages of the mapped file back to the system; they are read again when needed."""
        forget(self.a)
        forget(self.b)


class LowRank(ModuleUpdate):
    """One module's update, ΔW = Σ weight · b @ a over its terms. `LowRank(a, b)` has one term."""

    kind: ClassVar[str] = "low-rank"

    def __init__(self, a: Array, b: Array, weight: float = 1.0) -> None:
        self.terms: tuple[Term, ...] = (Term(a, b, weight),)

    @classmethod
    def sum(cls, updates: Iterable[Self], weights: Iterable[float]) -> Self:
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

    def add_to(self, dense: Factor, rows: slice | _Indices = slice(None)) -> Factor:
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

    def tensors(self, dtype: np.dtype[Any] = FLOAT32) -> dict[str, Later]:
        """A and B."""
        a, b = self.later(dtype)
        return {A: a, B: b}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Array]) -> Self:
        return cls(stored[A], stored[B])

    def later(self, dtype: np.dtype[Any] = FLOAT32) -> tuple[Later, Later]:
        """A and B, rounded to a dtype when they are written."""
        (out, into), rank = self.shape, self.rank
        return (
            Later(dtype, (rank, into), lambda: self.a.astype(dtype, copy=False)),
            Later(dtype, (out, rank), lambda: self.b.astype(dtype, copy=False)),
        )

    def forget(self) -> None:
        for term in self.terms:
            term.forget()

    def infinite(self) -> str:
        factors = (("factor A", self.a), ("factor B", self.b))
        return next((name for name, factor in factors if not np.isfinite(factor).all()), "")

    @classmethod
    def inner(cls, rows: Sequence[Self], columns: Sequence[Self] | None = None) -> Floats:
        """⟨ΔWᵢ, ΔWⱼ⟩ (rows, columns) in float64; of `rows` among themselves without `columns`.

        tr((BⱼᵀBᵢ)(AᵢAⱼᵀ)), several updates' factors at a time: O(Σrᵢ · Σrⱼ · (out + in)).
        """
        others = rows if columns is None else columns
        products = np.zeros((len(rows), len(others)))
        for n, batch in enumerate(left := _batches(rows)):
            owners, a, b = first = _side_by_side(rows, batch)
            for other in left[n:] if columns is None else _batches(others):
                same = others is rows and other is batch
                other_owners, other_a, other_b = first if same else _side_by_side(others, other)
                product = (b.T @ other_b) * (a @ other_a.T)  # (Σrᵢ, Σrⱼ) of the batches
                np.add.at(products, (owners[:, None], other_owners[None, :]), product)
        return np.triu(products) + np.triu(products, 1).T if columns is None else products

    def pieces(self) -> list[LowRank]:
        """Updates of a smaller rank whose sum it is: `inner` takes up whole updates, and a stacked one is many."""
        return [
            LowRank(term.a[start : start + _BATCH], term.b[:, start : start + _BATCH], term.weight)
            for term in self.terms
            for start in range(0, len(term.a), _BATCH)
        ]

    def energy(self) -> float:
        """‖ΔW‖², in float64; memory is flat in rank."""
        return float(LowRank.inner(self.pieces()).sum())

    def compact(self, rank: int) -> Truncated[Self]:
        """The best approximation of at most this rank, by `truncate.of_factors`; from a rank on where dense is smaller,
        as with many clients, by `truncate.of_dense`: memory is two modules at most."""
        if not 0 < rank < self.rank:
            return super().compact(rank)
        if self.rank >= min(self.shape):
            return self.nearest(self.delta(), rank)
        return self._from_factors(truncate.of_factors(self.a, self.b, rank))

    @classmethod
    def nearest(cls, dense: Factor, rank: int) -> Truncated[Self]:
        """The best approximation of ΔW (out, in) of this rank."""
        return cls._from_factors(truncate.of_dense(dense, rank))

    @classmethod
    def _from_factors(cls, factors: truncate.Factors) -> Truncated[Self]:
        return Truncated(cls(factors.a, factors.b), factors.kept, factors.whole)

    def equals(self, other: Self) -> bool:
        same = np.array_equal(self.b, other.b) and np.array_equal(self.a, other.a)
        self.forget()
        return same

    @classmethod
    def by_tensor(cls, updates: Sequence[Self], weights: Sequence[float]) -> Self:
        """Σ weight · A and Σ weight · B: a (r, in), b (out, r). Of one rank; in the memory of one client's."""
        return cls(_weighted_sum(updates, "a", weights), _weighted_sum(updates, "b", weights))

    def with_mean_b(self, updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """This A, and Σ weight · B of the updates, which have the same A."""
        return LowRank(self.a, _weighted_sum(updates, "b", weights))

    def between(self, start: Self, share: float) -> Self:
        """A₀ + share · (A − A₀), and B likewise, in the start's own rank."""
        s = np.float32(share)
        return type(self)(start.a + s * (self.a - start.a), start.b + s * (self.b - start.b))

    def plus(self, start: Self, weight: float, *, keep_rank: bool = False) -> Self:
        """ΔW + weight · ΔW₀. The start's factors are in it once, however many terms of the update are the start
        already, and not at all where they cancel. `keep_rank`: both have one A, and so has the sum."""
        if keep_rank:
            return type(self)(self.a, self.b + np.float32(weight) * start.b)
        (first,) = start.terms
        others = [term for term in self.terms if term.a is not first.a or term.b is not first.b]
        weight += sum(term.weight for term in self.terms if term.a is first.a and term.b is first.b) / first.weight
        parts = [type(self)(*term) for term in others]
        if others and abs(weight) < _NOTHING:
            return self.sum(parts, [1.0] * len(parts))
        return self.sum([*parts, start], [*[1.0] * len(parts), weight])

    @classmethod
    def have_one_frozen_part(cls, updates: Sequence[Self]) -> bool:
        """Whether all have the same A, to the bit."""
        first = updates[0]
        a = first.a
        for other in updates[1:]:
            if not np.array_equal(a, other.a):
                return False
            other.forget()
        first.forget()
        return True


def _batches(updates: Sequence[LowRank]) -> list[_Indices]:
    """Indices of updates, as many together as have about _BATCH columns of B."""
    before = np.cumsum([0, *(update.rank for update in updates)])[:-1]
    cuts = np.flatnonzero(np.diff(before // _BATCH)) + 1
    return [batch for batch in np.split(np.arange(len(updates)), cuts) if len(batch)]


def _side_by_side(updates: Sequence[LowRank], batch: _Indices) -> tuple[_Indices, Floats, Floats]:
    """Whose each column is (Σr), A (Σr, in) and B (out, Σr)."""
    chosen = [updates[i] for i in batch]
    a = np.concatenate([update.a for update in chosen], axis=0, dtype=np.float64)
    b = np.concatenate([update.b for update in chosen], axis=1, dtype=np.float64)
    for update in chosen:
        update.forget()
    return np.repeat(batch, [update.rank for update in chosen]), a, b


def _weighted_sum(updates: Sequence[LowRank], factor: str, weights: Sequence[float]) -> Factor:
    """Σ wᵢ of one factor of each, one after the other."""
    total: Factor | None = None
    for update, weight in zip(updates, weights, strict=True):
        part = np.float32(weight) * getattr(update, factor)
        total = part if total is None else np.add(total, part, out=total)
        update.forget()
    assert total is not None, "a cohort has at least one client"
    return total


def _float32(factor: Array) -> Factor:
    return factor.astype(np.float32, copy=False)


def _weighted(factor: Array, weight: float) -> Factor:
    return _float32(factor) if weight == 1.0 else _float32(factor) * np.float32(weight)
