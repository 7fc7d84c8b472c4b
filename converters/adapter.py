"""The common adapter layout that every format is read into and written from.

In memory an adapter is a mapping from module names, as PEFT and transformers name them
(`model.layers.0.self_attn.q_proj`), to low-rank factors in float32 with ΔW = B @ A. All scaling (alpha/r, rsLoRA,
MLX's scale) is folded into B on the way in, so the scaling of this layout is always 1.

On disk it is one safetensors file: `NAME.lora_A.weight` (r, in) and `NAME.lora_B.weight` (out, r), in float32,
bfloat16 or float16, with `format=oneround/1` in the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converters import tensors
from converters.errors import BadAdapter, LayoutMismatch

FORMAT = "oneround/1"
Factor = NDArray[np.float32]

WIRE_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_A, _B = ".lora_A.weight", ".lora_B.weight"
_VOCABULARY = ("lm_head", "embed_tokens", "embed_out", "embed_in", "wte", "word_embeddings")


class Shape(NamedTuple):
    """The shape of an adapted linear layer's weight: (out, in)."""

    out: int
    into: int


class LowRank(NamedTuple):
    """One module's update ΔW = b @ a, with a (r, in) and b (out, r)."""

    a: Factor
    b: Factor

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> Shape:
        return Shape(int(self.b.shape[0]), int(self.a.shape[1]))

    def delta(self) -> Factor:
        """ΔW (out, in), dense."""
        return self.b @ self.a


@dataclass(frozen=True)
class Adapter:
    """Factors by module name, and what is known of how they were made (strings, as in the file's header)."""

    modules: Mapping[str, LowRank]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: factors.rank for name, factors in self.modules.items()}


class _Mapped(Mapping[str, LowRank]):
    """Factors that are read from the mapped file, and made float32, one module at a time."""

    def __init__(self, found: Mapping[str, tensors.Array]) -> None:
        self._found = found
        self._names = sorted(name.removesuffix(_A) for name in found if name.endswith(_A))

    def __getitem__(self, name: str) -> LowRank:
        a, b = self._found[name + _A], self._found[name + _B]
        return LowRank(a.astype(np.float32), b.astype(np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read(path: Path) -> Adapter:
    """Read an adapter in the common layout; factors stay on disk until they are asked for.

    Raises:
        BadAdapter: not this layout, an unknown tensor name, a lone factor, or ranks that do not agree.
    """
    found, metadata = tensors.read(path)
    if metadata.get("format") != FORMAT:
        raise BadAdapter(
            f"{path} is not an adapter in the common layout: its header has no format={FORMAT}",
            hint=f"adapter-convert {path} OUT.safetensors --to canonical",
        )
    for name in found:
        if not name.endswith((_A, _B)):
            raise BadAdapter(f"{path}: unknown tensor {name}; expected names that end in {_A} or {_B}")
    _check_pairs(_half(found, _A), _half(found, _B), path)
    return Adapter(_Mapped(found), metadata)


def pair(
    a: Mapping[str, tensors.Array], b: Mapping[str, tensors.Array], path: Path
) -> dict[str, tuple[Factor, Factor]]:
    """Factors by module, from a reader's A (r, in) and B (out, r), checked and made float32.

    Raises:
        BadAdapter: a lone factor, one that is not a matrix of floats, ranks that do not agree, nothing at all, or a
            module that llama.cpp has no LoRA for.
    """
    _check_pairs(a, b, path)
    for name in a:
        if name.rsplit(".", 1)[-1] in _VOCABULARY:
            raise BadAdapter(f"{path}: {name} is adapted; LoRA on embeddings and output layers cannot be converted")
    return {name: (_float32(a[name]), _float32(b[name])) for name in sorted(a)}


def write(adapter: Adapter, path: Path, dtype: str = "float32") -> None:
    """Write an adapter in the common layout, rounded to `dtype`; atomic and synced."""
    wire = WIRE_DTYPES[dtype]
    found: dict[str, tensors.Array] = {}
    for name, factors in adapter.modules.items():
        found[name + _A] = factors.a.astype(wire)
        found[name + _B] = factors.b.astype(wire)
    tensors.write(path, found, {**adapter.metadata, "format": FORMAT, "dtype": dtype})


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
    for name, factors in adapter.modules.items():
        if factors.shape != expected[name]:
            raise LayoutMismatch(f"{name} adapts a weight of shape {factors.shape}, the base has {expected[name]}")
        for letter, factor in (("A", factors.a), ("B", factors.b)):
            if not np.isfinite(factor).all():
                raise BadAdapter(f"{name}: factor {letter} holds NaN or Inf")


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
    return np.ascontiguousarray(factor, np.float32)


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
