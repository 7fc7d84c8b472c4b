"""Updates of any kind: one module's change of a weight, ΔW, in the form that it travels in, and many by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converters.tensors import Array, Later
from oneround.errors import BadAdapter, LayoutMismatch

Factor = NDArray[np.float32]
Floats = NDArray[np.float64]
FLOAT32: np.dtype[Any] = np.dtype(np.float32)
WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": FLOAT32,
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class Shape(NamedTuple):
    """The shape of an adapted linear layer's weight: (out, in)."""

    out: int
    into: int


class ModuleUpdate(ABC):
    """One module's update: a ΔW of a weight (out, in), in the tensors that it travels in.

    It never changes. Its tensors may lie in mapped files, in any wire dtype; nothing is read or multiplied before it is
    asked for, and `forget` gives the pages back. So an update that is the sum of two hundred files costs no more memory
    than their names. All updates of one module that are compared or added are of one class and one shape.

    A kind whose tensors are ΔW itself, as they are for dense updates and vectors, writes the abstract methods; the
    others are for kinds that are kept in another form.
    """

    kind: ClassVar[str]  # its name, for people

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of the weight that it is added to."""

    @classmethod
    @abstractmethod
    def sum(cls, updates: Iterable[Self], weights: Iterable[float]) -> Self:
        """Σ weight · ΔW, exactly, by naming what is summed: nothing is computed yet."""

    @classmethod
    @abstractmethod
    def inner(cls, rows: Sequence[Self], columns: Sequence[Self] | None = None) -> Floats:
        """⟨ΔWᵢ, ΔWⱼ⟩ (rows, columns) in float64; of `rows` among themselves without `columns`.

        Memory is that of a few updates, whatever their number.
        """

    @classmethod
    @abstractmethod
    def nearest(cls, dense: Factor, rank: int) -> Truncated[Self]:
        """The update of this kind that is nearest to ΔW (out, in); of at most this rank, if the kind has one."""

    @abstractmethod
    def add_to(self, dense: Factor, rows: slice | NDArray[np.intp] = slice(None)) -> Factor:
        """Add these rows of ΔW to `dense` (rows, in), in place; returns it."""

    @abstractmethod
    def tensors(self, dtype: np.dtype[Any] = FLOAT32) -> dict[str, Later]:
        """What a file holds of it, by the end of the tensor's name, rounded to `dtype` when it is written."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, stored: Mapping[str, Array]) -> Self:
        """Of what `tensors` named, as it lies in a file."""

    @abstractmethod
    def forget(self) -> None:
        """Give the pages of mapped files back to the system; they are read again when needed."""

    @property
    def rank(self) -> int:
        """Of its factors; 0 where a kind has none."""
        return 0

    def delta(self) -> Factor:
        """ΔW (out, in), dense."""
        return self.add_to(np.zeros(self.shape, np.float32))

    def energy(self) -> float:
        """‖ΔW‖², in float64."""
        return float(self.inner([self])[0, 0])

    def compact(self, rank: int) -> Truncated[Self]:
        """The nearest update of at most this rank; itself where `rank` is 0, or the kind has none.

        The energy is only computed where a rank is given: what other modules lose is held against it.
        """
        energy = self.energy() if rank else 0.0
        return Truncated(self, energy, energy)

    def equals(self, other: Self) -> bool:
        """Whether all tensors are the same, to the bit."""
        others = other.tensors()
        same = all(np.array_equal(tensor.make(), others[end].make()) for end, tensor in self.tensors().items())
        self.forget()
        return same

    def infinite(self) -> str:
        """Which of its tensors holds NaN or Inf; empty if none does."""
        return next((end for end, tensor in self.tensors().items() if not np.isfinite(tensor.make()).all()), "")

    @classmethod
    def by_tensor(cls, updates: Sequence[Self], weights: Sequence[float]) -> Self:
        """Σ weight · tensor, of each tensor by itself: of what is sent, rather than of ΔW. Computed, one client after
        another."""
        return cls.sum(updates, weights)

    def between(self, start: Self, share: float) -> Self:
        """start + share · (update − start), of each tensor by itself."""
        return self.sum([self, start], [share, 1.0 - share])

    def plus(self, start: Self, weight: float, *, keep_rank: bool = False) -> Self:
        """ΔW + weight · ΔW₀, exactly. `keep_rank`: both `have_one_frozen_part`, and the sum has it too."""
        return self.sum([self, start], [1.0, weight])

    @classmethod
    def have_one_frozen_part(cls, updates: Sequence[Self]) -> bool:
        """Whether there are tensors that nobody trained, the same in all of these, to the bit."""
        return False


M = TypeVar("M", bound=ModuleUpdate)
M_co = TypeVar("M_co", bound=ModuleUpdate, covariant=True)


class Truncated(NamedTuple, Generic[M]):
    """An update, and the energy ‖ΔW‖² that it has of what there was."""

    update: M
    kept: float
    whole: float


class LazyUpdates(Mapping[str, M_co]):
    """Updates by module name, each made when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], M_co]) -> None:
        self._names = dict.fromkeys(sorted(names))
        self._make = make

    def __getitem__(self, name: str) -> M_co:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Update(Generic[M_co]):
    """Updates by module name, and what is known of how they were made (strings, as in the file's header)."""

    modules: Mapping[str, M_co]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: update.rank for name, update in self.modules.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: update.shape for name, update in self.modules.items()}


def check(update: Update[ModuleUpdate], expected: Mapping[str, Shape]) -> None:
    """Hold an update against the modules and shapes (out, in) that it has to have.

    Raises:
        LayoutMismatch: a module is missing, unknown, or of another shape.
        BadAdapter: a tensor holds NaN or Inf.
    """
    missing = sorted(expected.keys() - update.modules.keys())
    if missing:
        raise LayoutMismatch(f"the adapter lacks {len(missing)} of the job's modules, {missing[0]} for one")
    unknown = sorted(update.modules.keys() - expected.keys())
    if unknown:
        raise LayoutMismatch(
            f"the adapter has {len(unknown)} modules that the job does not ask for, {unknown[0]} for one"
        )
    for name, module in update.modules.items():
        if module.shape != expected[name]:
            raise LayoutMismatch(f"{name} adapts a weight of shape {module.shape}, the base has {expected[name]}")
        if tensor := module.infinite():
            raise BadAdapter(f"{name}: {tensor} holds NaN or Inf")
        module.forget()
