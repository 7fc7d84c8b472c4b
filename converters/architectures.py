"""Base models as Hugging Face folders: their linear layers, their names in GGUF, and the order of their rows there.

Names and shapes of a known family come from config.json and are held against the headers of the safetensors files, so
a model that is described here has every layer that an adapter can ask for. A model of another family is described by
looking at a GGUF of it (`other_families`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from converters import checkpoint, other_families
from converters.adapter import Shape
from converters.checkpoint import model_files, weights
from converters.families import FAMILIES, Base, Family, Linear, NotKnownHere, interleaved, names_in_gguf
from converters.settings import Settings
from oneround.errors import BadModel, LayoutMismatch

__all__ = [
    "FAMILIES",
    "Base",
    "Family",
    "Linear",
    "adapted",
    "as_in_gguf",
    "check_fits",
    "checkpoint_names",
    "describe",
    "gguf_name",
    "interleave",
    "is_known",
    "model_files",
    "row_order",
    "weights",
    "within_block",
]

Number = TypeVar("Number", bound=np.generic)


def describe(folder: Path, gguf: Path | None = None) -> Base:
    """Describe the model in a Hugging Face folder, from config.json and the headers of its safetensors files.

    `gguf` is the same model as a GGUF file; it is looked at when the family is not known here.

    Raises:
        BadModel: no such folder, files missing or not sound, or a family that is not known here and no GGUF.
    """
    config = checkpoint.config(folder)
    name = _name(config)
    if config.get("quantization_config"):
        raise BadModel(f"{folder} holds a quantised checkpoint", hint="give the model's float16 or bfloat16 original")
    if name in FAMILIES:
        return _of_known_family(folder, name, FAMILIES[name], config)
    if gguf is None:
        raise NotKnownHere(f"{folder}: the model family {name} is not supported without a GGUF of it")
    return other_families.look(folder, name, config, gguf)


def is_known(folder: Path) -> bool:
    """Whether a folder's model is of a known family, which can be described without a GGUF.

    Raises:
        BadModel: there is no sound config.json.
    """
    return _name(checkpoint.config(folder)) in FAMILIES


def adapted(base: Base, target_modules: Sequence[str]) -> dict[str, Shape]:
    """The layers that `target_modules` names, and their shapes (out, in).

    "all-linear", or names matched from the right at a dot, as PEFT does: `q_proj`, `mlp.up_proj`, or a whole name.

    Raises:
        LayoutMismatch: a name matches no linear layer of the blocks.
    """
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        return dict(base.linears)
    layers: set[str] = set()
    for target in targets:
        matched = {name for name in base.linears if name == target or name.endswith(f".{target}")}
        if any(f".{name}".endswith(f".{target}") for name in (base.family.embedding, base.family.output)):
            raise LayoutMismatch(f"{target} cannot be adapted: llama.cpp has no LoRA for embeddings and output layers")
        if not matched:
            short = sorted({name.rsplit(".", 1)[-1] for name in base.linears})
            raise LayoutMismatch(
                f"no layer of the base is called {target}; there are {', '.join(short)}, or all-linear"
            )
        layers |= matched
    if not layers:
        raise LayoutMismatch("target_modules names no layer", hint='target_modules = "all-linear"')
    return {name: shape for name, shape in base.linears.items() if name in layers}


def check_fits(base: Base, shapes: Mapping[str, Shape]) -> None:
    """Hold adapted modules against the base.

    Raises:
        LayoutMismatch: a module that the base does not have, or one of another shape.
    """
    for name, shape in shapes.items():
        if name not in base.linears:
            raise LayoutMismatch(f"the base has no linear layer {name}")
        if shape != base.linears[name]:
            raise LayoutMismatch(
                f"{name} is {tuple(base.linears[name])} in the base, the adapter is for {tuple(shape)}"
            )


def within_block(base: Base, module: str) -> tuple[int, str]:
    """A module's block and its name there: (3, "self_attn.q_proj")."""
    number, _, inner = module.removeprefix(f"{base.family.blocks}.").partition(".")
    return int(number), inner


def gguf_name(base: Base, tensor: str) -> str:
    """The name in GGUF of a checkpoint's tensor: `blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        BadModel: GGUF has no name for it.
    """
    name = names_in_gguf(base.arch, base.n_layers).get_name(key=tensor, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise NotKnownHere(f"the tensor {tensor} has no place in a GGUF file for {base.arch}")
    return str(name)


def checkpoint_names(base: Base) -> dict[str, str]:
    """The module of every linear layer by its weight's name in GGUF: the way back from `gguf_name`."""
    return {gguf_name(base, f"{module}.weight"): module for module in base.linears}


def row_order(base: Base, module: str) -> NDArray[np.intp] | None:
    """For each row in GGUF of a module's weight, bias or lora_B the checkpoint's row; None when they are the same."""
    linear = base.family.linears.get(within_block(base, module)[1]) if module in base.linears else None
    if linear is None or not linear.heads:
        return None
    return interleaved(base.linears[module].out, getattr(base, linear.heads))


def interleave(base: Base, module: str, rows: NDArray[Number]) -> NDArray[Number]:
    """Rows (out, …) of a weight, a bias or a lora_B in llama.cpp's order."""
    order = row_order(base, module)
    return rows if order is None else rows[order]


def as_in_gguf(base: Base, name: str, tensor: NDArray[Number]) -> NDArray[Any]:
    """A checkpoint's tensor with the values that it has in GGUF, and in their order."""
    module, _, _ = name.rpartition(".")
    if base.family.norm_shift and module.endswith("norm"):
        return tensor.astype(np.float32) + np.float32(base.family.norm_shift)
    return interleave(base, module, tensor)


def _name(config: Settings) -> str:
    names = config.items("architectures")
    return names[0] if names and isinstance(names[0], str) else config.text("model_type", "unknown")


def _of_known_family(folder: Path, name: str, family: Family, file_config: Settings) -> Base:
    config = Settings({**family.defaults, **file_config.values}, file_config.source, BadModel)
    if (activation := config.text(family.activation_key, family.activations[0])) not in family.activations:
        raise config.bad(f"llama.cpp does not know {name} with {family.activation_key} {activation}")
    hidden, n_heads = config.integer("hidden_size", high=1 << 20), config.integer("num_attention_heads", high=1 << 14)
    n_kv_heads = config.integer("num_key_value_heads", n_heads, high=n_heads)
    head_dim = config.integer("head_dim", max(hidden // n_heads, 1), high=1 << 14)
    if n_heads % n_kv_heads or head_dim % 2:
        raise config.bad(f"{n_heads} heads, {n_kv_heads} key-value heads of {head_dim} do not go together")
    if not family.free_heads and n_heads * head_dim != hidden:
        raise config.bad(f"{n_heads} heads of {head_dim} do not make up hidden_size {hidden}")
    intermediate = config.integer("intermediate_size", high=1 << 22)
    sizes = {
        "hidden": hidden,
        "heads": n_heads * head_dim,
        "kv_heads": n_kv_heads * head_dim,
        "qkv": (n_heads + 2 * n_kv_heads) * head_dim,
        "intermediate": intermediate,
        "gate_up": 2 * intermediate,
    }
    n_layers = config.integer("num_hidden_layers", high=1 << 12)
    linears = {
        f"{family.blocks}.{n}.{inner}": Shape(sizes[linear.out], sizes[linear.into])
        for n in range(n_layers)
        for inner, linear in family.linears.items()
    }
    vocab_size, tied = config.integer("vocab_size", high=1 << 24), config.flag("tie_word_embeddings")
    if not (tied or family.untied):
        raise config.bad(f"llama.cpp has no {name} whose output layer is not the embedding")
    return Base(
        name=name,
        family=family,
        config=config.values,
        dtype=_check_weights(folder, family, linears, Shape(vocab_size, hidden), tied),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        tied=tied,
        linears=linears,
    )


def _check_weights(folder: Path, family: Family, linears: Mapping[str, Shape], vocabulary: Shape, tied: bool) -> str:
    """Hold the config's shapes against the files; returns the matrices' dtype."""
    arrays = weights(folder)
    expected = {f"{name}.weight": shape for name, shape in linears.items()}
    expected[f"{family.embedding}.weight"] = vocabulary
    if not tied:
        expected[f"{family.output}.weight"] = vocabulary
    for name, shape in expected.items():
        if name not in arrays:
            raise BadModel(f"{folder}: config.json asks for a tensor {name} that no weight file holds")
        if arrays[name].shape != shape:
            raise BadModel(f"{folder}: {name} is {arrays[name].shape}, config.json makes it {tuple(shape)}")
        checkpoint.dtype(folder, name, arrays[name])
    first = next(iter(expected))
    return checkpoint.dtype(folder, first, arrays[first])
