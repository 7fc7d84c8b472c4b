"""What a round costs for one model, in bytes and in seconds: from what the other benchmarks have measured."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_publish import SHAPE
from train_inputs import SHAPES

from converters import adapter
from converters.adapter import Shape
from converters.families import FAMILIES

Found = dict[str, Any]

RANK = 16


@dataclass(frozen=True)
class Model:
    """What a round of a base costs. Bytes are those of one client, in the first round and in each further one."""

    step_seconds: float
    publish_seconds: float
    up_bytes: float
    first_down_bytes: float
    further_down_bytes: float
    sources: Mapping[str, str]


def demo_model(wire: Found) -> Model:
    """The base that ../README's demo uses: everything measured, by wire_cost.py."""
    arms, by_hour = wire["bases"]["base"], wire["by_hour"]
    further = arms.get("chain", arms["exact"])
    return Model(
        step_seconds=by_hour["step_seconds"],
        publish_seconds=arms["exact"]["publish_seconds"],
        up_bytes=arms["exact"]["up_per_client"],
        first_down_bytes=arms["exact"]["down_per_client"],
        further_down_bytes=further["down_per_client"],
        sources={
            "step_seconds": "wire_cost.json, by_hour: one client alone on two cores, 8 windows of at most 256 tokens",
            "publish_seconds": "wire_cost.json, exact: from the last receipt to the publication of f16 and q8_0",
            "up_bytes, down_bytes": "wire_cost.json, exact and chain",
        },
    )


def measured_in_peace(wire: Found) -> bool:
    """Whether the seconds in wire_cost.json are the demo base's own: the client that trained alone, with a thread for
    each core, had hardly anybody beside it."""
    return bool(wire["by_hour"]["load"] <= 1.5 * wire["machine"]["cores"])


def large_model(wire: Found, publish: Found, train: Found) -> Model:
    """One of TinyLlama-1.1B's shape; what was measured on smaller ones is scaled, and says so."""
    sent, initial = adapter_bytes(SHAPE, "bfloat16"), adapter_bytes(SHAPE, "float32")
    ran = train["contestants"]["gsm8k"]["torch"]["seconds"]["median"]
    steps = math.ceil(train["datasets"]["gsm8k"]["examples"] / train["settings"]["batch_size"])
    times = matrix_weights(SHAPE) / matrix_weights(SHAPES[train["settings"]["shape"]])
    parts = {"merge": publish["ours"]["seconds"], "q8_0": publish["afterwards"]["q8_0"]["seconds"]}
    parts["verify, twice"] = 2 * publish["afterwards"]["verify"]["seconds"]
    down = initial + other(wire, "down", initial)
    return Model(
        step_seconds=ran / steps * times,
        publish_seconds=sum(parts.values()),
        up_bytes=sent + other(wire, "up", sent),
        first_down_bytes=down,
        further_down_bytes=down,
        sources={
            "step_seconds": f"scaled, not measured: train.json has {ran / steps:.2f} s for 8 examples of GSM8K at 28M "
            f"parameters, PyTorch in bfloat16 on two cores; times {times:.1f}, the ratio of the matrices' weights",
            "publish_seconds": "publish.json, two cores: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()),
            "up_bytes, down_bytes": f"rank {RANK}, all-linear, written by converters.adapter: {sent:,} bytes in "
            f"bfloat16, {initial:,} in float32; the rest by a line through wire_cost.json's bases",
        },
    )


def adapter_bytes(shape: Mapping[str, Any], dtype: str) -> int:
    """Size of a rank-16 adapter's file for all linear layers of a Llama of this shape."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        adapter.write(adapter.initial(linears(shape), RANK, seed=0), file, dtype)
        return file.stat().st_size


def linears(shape: Mapping[str, Any]) -> dict[str, Shape]:
    """The linear layers of a Llama's blocks, (out, in), from the values of its config.json."""
    head = shape["hidden_size"] // shape["num_attention_heads"]
    sizes = {
        "hidden": shape["hidden_size"],
        "heads": shape["num_attention_heads"] * head,
        "kv_heads": shape["num_key_value_heads"] * head,
        "intermediate": shape["intermediate_size"],
    }
    family = FAMILIES["LlamaForCausalLM"]
    return {
        f"{family.blocks}.{n}.{inner}": Shape(sizes[linear.out], sizes[linear.into])
        for n in range(shape["num_hidden_layers"])
        for inner, linear in family.linears.items()
    }


def matrix_weights(shape: Mapping[str, Any]) -> int:
    """Weights that a token is multiplied with, the output layer among them: a step's work is proportional to them."""
    output: int = shape["vocab_size"] * shape["hidden_size"]
    return sum(layer.out * layer.into for layer in linears(shape).values()) + output


def other(wire: Found, way: str, size: int) -> float:
    """Bytes besides a file of this size: a line through what was measured, over bases and arms of one round (in a chain
    the coordinator's list of jobs grows)."""
    file = {"up": "adapter_bytes", "down": "initial_bytes"}[way]
    alone = [arm for arms in wire["bases"].values() for arm in arms.values() if "rounds" not in arm]
    points = [(arm[file], arm[f"other_{way}"]) for arm in alone]
    sizes, others = np.array(points, dtype=float).T
    if len(set(sizes)) < 2:
        return float(others.mean() * size / sizes.mean())
    slope, fixed = np.polyfit(sizes, others, 1)
    return float(fixed + slope * size)
