"""Mixtures of experts: one module per expert in the common layout, one stack per layer in mlx-lm.

The common layout has the names of the checkpoints on the hub: `….mlp.experts.E.up_proj`, and in Mixtral
`….block_sparse_moe.experts.E.w3`. mlx-lm has one switch layer for all experts, `….mlp.switch_mlp.up_proj`.

Source: mlx-lm 0.32, the `sanitize` of models/mixtral.py, qwen2_moe.py, olmoe.py and their like.
"""

from __future__ import annotations

import re

from converters.adapter import Shape
from converters.architectures import Base
from converters.errors import LayoutMismatch

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_BACK = {theirs: ours for ours, theirs in _MIXTRAL.items()}
_SWITCH = re.compile(r"(?P<layer>.+)\.(switch_mlp|experts)\.(?P<projection>\w+)")
_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<number>\d{1,5})\.(?P<projection>\w+)")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # in config.json, by family
_NAMED_EXPERTS = {"Klear", "afmoe", "dots1"}  # model types whose switch layer mlx-lm calls `experts`


def of_switch(name: str, count: int) -> list[str] | None:
    """The modules of a switch layer's experts; None when the name is not one's."""
    match = _SWITCH.fullmatch(name)
    if match is None:
        return None
    projection = match["projection"]
    if match["layer"].endswith("block_sparse_moe"):
        projection = _MIXTRAL.get(projection, projection)
    return [f"{match['layer']}.experts.{number}.{projection}" for number in range(count)]


def switch_of(base: Base, module: str) -> tuple[str, int] | None:
    """An expert's switch layer and its number there; None for a module that is no expert."""
    match = _EXPERT.fullmatch(module)
    if match is None:
        return None
    projection = _BACK.get(match["projection"], match["projection"])
    place = "experts" if base.config.get("model_type") in _NAMED_EXPERTS else "switch_mlp"
    return f"{match['layer']}.{place}.{projection}", int(match["number"])


def is_expert(module: str) -> bool:
    return _EXPERT.fullmatch(module) is not None


def count(base: Base) -> int:
    """How many experts a layer of the base has.

    Raises:
        LayoutMismatch: none, by its config.
    """
    found = next((base.config[key] for key in _COUNTS if base.config.get(key)), 0)
    if not isinstance(found, int) or not 1 <= found <= 1 << 16:
        raise LayoutMismatch("the adapter is for experts, and the base has none")
    return found


def check(switch: str, shapes: dict[int, Shape], n_experts: int) -> Shape:
    """The one shape of a switch layer's experts.

    Raises:
        LayoutMismatch: they differ, or one has a number that the base does not have.
    """
    if max(shapes) >= n_experts:
        raise LayoutMismatch(f"{switch}: there is no expert {max(shapes)}, the base has {n_experts}")
    if len(set(shapes.values())) > 1:
        raise LayoutMismatch(f"{switch}: its experts are not of one shape")
    return next(iter(shapes.values()))
