"""The common adapter layout that every format is read into and written from.

In memory an adapter is a mapping from module names, as PEFT and transformers name them
(`model.layers.0.self_attn.q_proj`), to low-rank factors in float32 with ΔW = B @ A. All scaling (alpha/r, rsLoRA,
MLX's scale) is folded into B on the way in, so the scaling of this layout is always 1.

On disk it is one safetensors file: `NAME.lora_A.weight` (r, in) and `NAME.lora_B.weight` (out, r), in float32,
bfloat16 or float16, with `format=oneround/1` in the header. Where A was frozen in training, at the value that it has in
another adapter, the file holds B alone, and `frozen_a` in its header is that adapter's SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters import tensors
from converters.updates.low_rank import A, B, LowRank, Term
from converters.updates.update import WIRE_DTYPES, Factor, LazyUpdates, Shape, Update, check
from oneround.errors import BadAdapter

__all__ = [
    "FORMAT",
    "FROZEN_A",
    "WIRE_DTYPES",
    "Adapter",
    "Factor",
    "LazyUpdates",
    "LowRank",
    "Shape",
    "Term",
    "check",
    "initial",
    "pair",
    "read",
    "write",
]

FORMAT = "oneround/1"
FROZEN_A = "frozen_a"
Adapter = Update[LowRank]

_VOCABULARY = ("lm_head", "embed_tokens", "embed_out", "embed_in", "wte", "word_embeddings")


def read(path: Path, frozen: Adapter | None = None) -> Adapter:
    """Read an adapter in the common layout; factors stay on disk until they are asked for.

    A file that holds B alone is completed by the A of `frozen`; whether that is the adapter that it was trained over is
    for the caller to see.

    Raises:
        BadAdapter: not this layout, an unknown tensor name, a lone factor, or ranks that do not agree.
    """
    stored, metadata = tensors.read(path)
    if metadata.get("format") != FORMAT:
        raise BadAdapter(
            f"{path} is not an adapter in the common layout: its header has no format={FORMAT}",
            hint="adapter-convert FOLDER OUT.safetensors --to canonical, with the folder that has its settings too",
        )
    for name in stored:
        if not name.endswith((A, B)):
            raise BadAdapter(f"{path}: unknown tensor {name}; expected names that end in {A} or {B}")
    if FROZEN_A in metadata:
        return _completed(path, stored, metadata, frozen)
    _check_pairs(_half(stored, A), _half(stored, B), path)
    names = [name.removesuffix(A) for name in stored if name.endswith(A)]
    return Adapter(LazyUpdates(names, lambda name: LowRank(stored[name + A], stored[name + B])), metadata)


def _completed(
    path: Path, stored: Mapping[str, tensors.Array], metadata: Mapping[str, str], frozen: Adapter | None
) -> Adapter:
    if alone := [name for name in stored if name.endswith(A)]:
        raise BadAdapter(f"{path} says that its A was frozen, and holds {alone[0]}")
    if frozen is None:
        raise BadAdapter(
            f"{path} holds B alone: its A was frozen, and is in the adapter with SHA-256 {metadata[FROZEN_A]}",
            hint="take the adapter that the coordinator has published",
        )
    b, whole = _half(stored, B), frozen.modules
    if strange := sorted(b.keys() - whole.keys()):
        raise BadAdapter(f"{path}: {strange[0]} has no A: the adapter that was frozen does not adapt it")
    _check_pairs({name: whole[name].terms[0].a for name in b}, b, path)
    return Adapter(LazyUpdates(b, lambda name: LowRank(whole[name].terms[0].a, stored[name + B])), metadata)


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
    wire, ends = WIRE_DTYPES[dtype], (B,) if frozen_a else (A, B)
    laid_out: dict[str, tensors.Later] = {}
    for name, update in adapter.modules.items():
        factors = update.tensors(wire)
        laid_out |= {name + end: factors[end] for end in ends}
    header = {name: value for name, value in adapter.metadata.items() if name != FROZEN_A}
    if frozen_a:
        header[FROZEN_A] = frozen_a
    tensors.write(path, laid_out, {**header, "format": FORMAT, "dtype": dtype})


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


def _half(stored: Mapping[str, tensors.Array], suffix: str) -> dict[str, tensors.Array]:
    return {name.removesuffix(suffix): tensor for name, tensor in stored.items() if name.endswith(suffix)}


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
