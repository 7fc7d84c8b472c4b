"""How much memory training will take, from what is known before it starts: an estimate, to warn by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from converters import checkpoint
from converters.settings import Settings
from converters.updates import sizes
from edge_client.backends import MemoryFigures
from edge_client.training.recipe import EXACT, Setup
from oneround.v1 import federation_pb2 as pb

_FLOAT = 4  # bytes
_WIDTH = {"float32": 4, "bfloat16": 2}
_SCALES = 0.5  # bits that the scales of a quantised base take for each weight
_RUNTIME_BYTES = 64 << 20  # threads, libraries that are loaded late


@dataclass(frozen=True)
class ModelShape:
    """What of a base model its need of memory follows from; widths in features."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    kv_heads: int
    vocabulary: int


def model(config: Settings, parameters: int) -> ModelShape:
    """From a config.json.

    Raises:
        BadModel: it does not say, as those of some families do not.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return ModelShape(
        parameters=parameters,
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        head_dim=config.integer("head_dim", max(hidden // heads, 1)),
        kv_heads=config.integer("num_key_value_heads", heads),
        vocabulary=config.integer("vocab_size"),
    )


def parameters(folder: Path) -> int:
    """Of the model in a folder, from the headers of its files.

    Raises:
        BadModel: its weights are missing or not sound.
    """
    return sum(int(tensor.size) for tensor in checkpoint.weights(folder).values())


def parameters_announced(files: Sequence[pb.Artifact], config: Settings) -> int:
    """Of a base whose files are not here yet, from their sizes and the type that its config.json names."""
    kind = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    weights = sum(file.size for file in files if file.name.endswith(".safetensors"))
    return weights // (4 if kind == "float32" else 2)


def memory_needed(
    base: ModelShape,
    job: pb.Job,
    figures: MemoryFigures,
    *,
    longest: int | None = None,
    setup: Setup = EXACT,
) -> int:
    """Bytes that training a language model takes over what the process has with its framework loaded.

    `longest` is the longest example in tokens, the job's max_seq_len if not given.

    The base, once; the adapter seven times (factors, gradients, two moments, and a snapshot of three); and for the
    longest part of a batch what the backward pass needs. For each token in each layer these are: two residuals and two
    normed inputs, queries and the attention's output, keys and values, gate, up, their product and the activation, and
    the rank of every adapter; with dropout also every adapter's input again and a mask; with checkpointing the layer's
    input, and all of it for one layer at a time. Then the logits, their logarithm and its gradient, of a chunk or of
    all tokens. Times what was measured for the backend; see MemoryFigures.

    Held against the peak of a child process on Linux x86-64 CPUs (PyTorch 2.13, MLX 0.32), for random Llamas of 0.1M to
    113M parameters, batches of 1 × 64 to 8 × 512 tokens: MLX in float32 0.9 to 1.35 times what was measured from 0.3 GB
    on; PyTorch (5M and 28M parameters, no dropout) in float32 and bfloat16, whole and in parts, about 1.0 to 1.4 times,
    with checkpointing 0.8. One run each; no GPU.
    """
    spec = job.spec
    length = min(longest or spec.train.max_seq_len, spec.train.max_seq_len)
    width = _WIDTH[setup.precision]
    examples = math.ceil(spec.train.batch_size / setup.parts)
    tokens = examples * (spec.train.max_seq_len if spec.train.packing else length)
    queries, keys = base.heads * base.head_dim, base.kv_heads * base.head_dim
    per_layer = 4 * base.hidden + 2 * queries + 2 * keys + 4 * base.intermediate
    if figures.keeps_attention:
        per_layer += base.heads * length
    adapters = spec.lora.rank * len(job.modules)
    if spec.lora.dropout:
        adapters += sum(module.in_features for module in job.modules) * 5 // 4
    activation_width = (
        base.hidden * base.layers + per_layer + adapters // base.layers
        if setup.checkpointing
        else base.layers * per_layer + adapters
    )
    activations = width * tokens * activation_width
    chunk = max(1, figures.logits_at_once // base.vocabulary) if figures.logits_at_once else tokens
    logits = 3 * _FLOAT * base.vocabulary * min(chunk, tokens)
    rounded = sum(module.out_features * module.in_features for module in job.modules) if setup.bits else 0
    weights = (base.parameters - rounded) * width + rounded * (setup.bits + _SCALES) / 8
    resident = weights + 7 * _FLOAT * sizes.elements(job)
    return int(_RUNTIME_BYTES + resident + figures.overhead * (activations + logits))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training is expected to take, and that are free now; None where the device has memory of its own."""

    needed: int
    available: int | None
    setup: Setup = EXACT

    @property
    def short(self) -> bool:
        return self.available is not None and self.needed > self.available


def free() -> int:
    """Bytes of the machine's memory that are free now."""
    return psutil.virtual_memory().available


def first_that_fits(
    needed: Callable[[Setup], int], available: int | None, batch_size: int, setup: Setup
) -> MemoryEstimate:
    """What training will take with the first setup that fits, from the given one on; or with the smallest, if none
    does. `available` in bytes; None: not known, so that any fits."""
    while True:
        estimate = MemoryEstimate(needed(setup), available, setup)
        smaller = setup.smaller(batch_size)
        if not estimate.short or smaller is None:
            return estimate
        setup = smaller
