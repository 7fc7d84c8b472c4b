"""Mixtures of experts: one module per expert in the common layout, one stack per layer in mlx-lm and in GGUF.

The common layout has the names of the checkpoints on the hub: `….mlp.experts.E.up_proj`, and in Mixtral
`….block_sparse_moe.experts.E.w3`. mlx-lm has one switch layer for all experts, `….mlp.switch_mlp.up_proj`, and
llama.cpp one tensor, `blk.N.ffn_up_exps.weight`.

Source: mlx-lm 0.32, the `sanitize` of models/mixtral.py, qwen2_moe.py, olmoe.py and their like; llama.cpp,
src/llama-graph.cpp (build_lora_mm_id).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from converters.adapter import Adapter, Factor, LowRank, Shape
from converters.architectures import Base, gguf_name
from oneround.errors import LayoutMismatch

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_BACK = {theirs: ours for ours, theirs in _MIXTRAL.items()}
_SWITCH = re.compile(r"(?P<layer>.+)\.(switch_mlp|experts)\.(?P<projection>\w+)")
_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<number>\d{1,5})\.(?P<projection>\w+)")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # in config.json, by family
_NAMED_EXPERTS = {"Klear", "afmoe", "dots1"}  # model types whose switch layer mlx-lm calls `experts`
# Model types by the place that their checkpoints give to experts, for those that are read from GGUF.
_SPARSE = {"mixtral", "phimoe", "minimax"}
_PLAIN = {"qwen2_moe", "qwen3_moe", "olmoe", "deepseek", "deepseek_v2", "deepseek_v3"}


class Stack(NamedTuple):
    """The updates of one layer's experts, None for an expert that has none."""

    layer: str  # `model.layers.0.mlp`
    projection: str  # as the checkpoint names it
    shape: Shape  # of one expert's weight
    updates: list[LowRank | None]

    def a(self, rank: int) -> Factor:
        """(E, rank, in); lower ranks and absent experts are filled up with zeros, which changes no ΔW."""
        return np.stack(
            [_filled(None if update is None else update.a, (rank, self.shape.into)) for update in self.updates]
        )

    def b(self, rank: int) -> Factor:
        """(E, out, rank)."""
        return np.stack(
            [_filled(None if update is None else update.b, (self.shape.out, rank)) for update in self.updates]
        )


def of_switch(name: str, count: int) -> list[str] | None:
    """The modules of a switch layer's experts; None when the name is not one's."""
    match = _SWITCH.fullmatch(name)
    if match is None:
        return None
    projection = match["projection"]
    if match["layer"].endswith("block_sparse_moe"):
        projection = _MIXTRAL.get(projection, projection)
    return [f"{match['layer']}.experts.{number}.{projection}" for number in range(count)]


def is_expert(module: str) -> bool:
    return _EXPERT.fullmatch(module) is not None


def stacks(update: Adapter, base: Base) -> Iterator[Stack]:
    """An adapter's experts by layer and projection.

    Raises:
        LayoutMismatch: the base has no such layer or expert, or the experts of a layer are not of one shape.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name in update.modules:
        if (match := _EXPERT.fullmatch(name)) is not None:
            groups.setdefault((match["layer"], match["projection"]), {})[int(match["number"])] = name
    count = _count(base) if groups else 0
    for (layer, projection), names in groups.items():
        block = re.match(rf"{re.escape(base.family.blocks)}\.(\d{{1,5}})\.", layer)
        if block is None or int(block[1]) >= base.n_layers:
            raise LayoutMismatch(f"the base has no layer {layer}")
        if max(names) >= count:
            raise LayoutMismatch(f"{layer}: there is no expert {max(names)}, the base has {count}")
        shapes = {update.modules[name].shape for name in names.values()}
        if len(shapes) > 1:
            raise LayoutMismatch(f"{layer}: its experts' {projection} are not of one shape")
        updates = [update.modules[names[number]] if number in names else None for number in range(count)]
        yield Stack(layer, projection, shapes.pop(), updates)


def in_mlx(base: Base, stack: Stack) -> str:
    """A stack's switch layer in mlx-lm."""
    place = "experts" if base.config.get("model_type") in _NAMED_EXPERTS else "switch_mlp"
    return f"{stack.layer}.{place}.{_BACK.get(stack.projection, stack.projection)}"


def in_gguf(base: Base, stack: Stack) -> str:
    """A stack's tensor in GGUF.

    Raises:
        BadModel: GGUF has no name for it.
    """
    return gguf_name(base, f"{stack.layer}.experts.{stack.projection}.weight")


def from_gguf(base: Base) -> dict[str, list[str]]:
    """The modules of a layer's experts by their tensor in GGUF; nothing for a base whose names are not known here."""
    kind = base.config.get("model_type")
    if kind not in _SPARSE | _PLAIN or not any(base.config.get(key) for key in _COUNTS):
        return {}
    modules_by_tensor = {}
    for number in range(base.n_layers):
        layer = f"{base.family.blocks}.{number}.{'block_sparse_moe' if kind in _SPARSE else 'mlp'}"
        for plain, mixtral in _MIXTRAL.items():
            stack = Stack(layer, mixtral if kind in _SPARSE else plain, Shape(0, 0), [])
            modules = of_switch(f"{layer}.switch_mlp.{plain}", _count(base))
            modules_by_tensor[in_gguf(base, stack)] = modules or []
    return modules_by_tensor


def _count(base: Base) -> int:
    """How many experts a layer of the base has.

    Raises:
        LayoutMismatch: none, by its config.
    """
    count = next((base.config[key] for key in _COUNTS if base.config.get(key)), 0)
    if not isinstance(count, int) or not 1 <= count <= 1 << 16:
        raise LayoutMismatch("the adapter is for experts, and the base has none")
    return count


def _filled(factor: Factor | None, shape: tuple[int, int]) -> Factor:
    filled = np.zeros(shape, np.float32)
    if factor is not None:
        filled[: factor.shape[0], : factor.shape[1]] = factor
    return filled
