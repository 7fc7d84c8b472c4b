"""Base models as Hugging Face folders: their linear layers, their names in GGUF, and what differs per family.

A family is one entry of `FAMILIES`. Names and shapes come from config.json and are held against the headers of the
safetensors files, so a model that is described here has every layer that an adapter can ask for.

Sources: transformers' modelling code for names and shapes; llama.cpp's conversion package for the permutation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from converters import settings, tensors
from converters.adapter import Shape
from converters.errors import BadModel, LayoutMismatch
from converters.settings import Settings
from converters.tensors import Array

Number = TypeVar("Number", bound=np.generic)

_TWO_WAYS_OUT = "give a base GGUF as the job's model.gguf, or put llama.cpp's convert_hf_to_gguf.py on PATH"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

# What a client needs beside the weights; never pickles, never code.
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Linear(NamedTuple):
    """A linear layer of a block: names of its sizes, and of the head count whose RoPE pairs llama.cpp interleaves."""

    out: str
    into: str
    heads: str = ""


@dataclass(frozen=True)
class Family:
    """What models of one kind share."""

    arch: str  # general.architecture in GGUF
    blocks: str  # the list of blocks, as transformers names it
    linears: Mapping[str, Linear]  # by name within a block
    activations: tuple[str, ...]  # what llama.cpp computes for this architecture, whatever the config says
    embedding: str = "model.embed_tokens"
    output: str = "lm_head"


LLAMA = Family(
    arch="llama",
    blocks="model.layers",
    linears={
        "self_attn.q_proj": Linear("heads", "hidden", "n_heads"),
        "self_attn.k_proj": Linear("kv_heads", "hidden", "n_kv_heads"),
        "self_attn.v_proj": Linear("kv_heads", "hidden"),
        "self_attn.o_proj": Linear("hidden", "heads"),
        "mlp.gate_proj": Linear("intermediate", "hidden"),
        "mlp.up_proj": Linear("intermediate", "hidden"),
        "mlp.down_proj": Linear("hidden", "intermediate"),
    },
    activations=("silu", "swish"),
)

FAMILIES: dict[str, Family] = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA}


@dataclass(frozen=True)
class Base:
    """A base model, as far as adapters and GGUF files need to know it."""

    name: str  # the class in transformers, LlamaForCausalLM for one
    family: Family
    config: Mapping[str, Any]
    dtype: str  # of the checkpoint's matrices: f32, f16 or bf16
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool  # lm_head is the embedding
    linears: Mapping[str, Shape]  # every linear layer of the blocks, (out, in), by transformers' module name

    @property
    def arch(self) -> str:
        """`general.architecture` in GGUF."""
        return self.family.arch


def describe(folder: Path) -> Base:
    """Describe the model in a Hugging Face folder, from config.json and the headers of its safetensors files.

    Raises:
        BadModel: no such folder, files missing or not sound, or a family that is not known here.
    """
    config = settings.read(_folder(folder) / "config.json", BadModel)
    names = config.items("architectures")
    name = names[0] if names and isinstance(names[0], str) else config.text("model_type", "unknown")
    family = FAMILIES.get(name)
    if family is None:
        raise BadModel(f"{folder}: the model family {name} is not supported yet", hint=_TWO_WAYS_OUT)
    if config.get("quantization_config"):
        raise BadModel(f"{folder} holds a quantised checkpoint", hint="give the model's float16 or bfloat16 original")
    if (activation := config.text("hidden_act", family.activations[0])) not in family.activations:
        raise BadModel(f"{folder}: llama.cpp does not know {name} with hidden_act {activation}", hint=_TWO_WAYS_OUT)

    hidden, n_heads = config.integer("hidden_size", high=1 << 20), config.integer("num_attention_heads", high=1 << 14)
    n_kv_heads = config.integer("num_key_value_heads", n_heads, high=n_heads)
    head_dim = config.integer("head_dim", max(hidden // n_heads, 1), high=1 << 14)
    if n_heads % n_kv_heads or head_dim % 2:
        raise config.bad(f"{n_heads} heads, {n_kv_heads} key-value heads of {head_dim} do not go together")
    sizes = {
        "hidden": hidden,
        "heads": n_heads * head_dim,
        "kv_heads": n_kv_heads * head_dim,
        "intermediate": config.integer("intermediate_size", high=1 << 22),
    }
    n_layers = config.integer("num_hidden_layers", high=1 << 12)
    linears = {
        f"{family.blocks}.{n}.{inner}": Shape(sizes[linear.out], sizes[linear.into])
        for n in range(n_layers)
        for inner, linear in family.linears.items()
    }
    vocab_size, tied = config.integer("vocab_size", high=1 << 24), config.flag("tie_word_embeddings")
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
        intermediate_size=sizes["intermediate"],
        vocab_size=vocab_size,
        tied=tied,
        linears=linears,
    )


def adapted(base: Base, target_modules: Sequence[str]) -> dict[str, Shape]:
    """The layers that `target_modules` names, and their shapes (out, in).

    "all-linear", or names matched from the right at a dot, as PEFT does: `q_proj`, `mlp.up_proj`, or a whole name.

    Raises:
        LayoutMismatch: a name matches no linear layer of the blocks.
    """
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        return dict(base.linears)
    found: set[str] = set()
    for target in targets:
        matched = {name for name in base.linears if name == target or name.endswith(f".{target}")}
        if any(f".{name}".endswith(f".{target}") for name in (base.family.embedding, base.family.output)):
            raise LayoutMismatch(f"{target} cannot be adapted: llama.cpp has no LoRA for embeddings and output layers")
        if not matched:
            short = sorted({name.rsplit(".", 1)[-1] for name in base.linears})
            raise LayoutMismatch(
                f"no layer of the base is called {target}; there are {', '.join(short)}, or all-linear"
            )
        found |= matched
    if not found:
        raise LayoutMismatch("target_modules names no layer", hint='target_modules = "all-linear"')
    return {name: shape for name, shape in base.linears.items() if name in found}


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
    name = _names(base.arch, base.n_layers).get_name(key=tensor, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise BadModel(f"the tensor {tensor} has no place in a GGUF file for {base.arch}", hint=_TWO_WAYS_OUT)
    return str(name)


def interleave(base: Base, module: str, rows: NDArray[Number]) -> NDArray[Number]:
    """Rows (out, …) of a weight, a bias or a lora_B in llama.cpp's order.

    llama.cpp rotates neighbouring pairs where transformers rotates the two halves of a head, so the rows of q and k
    go from (heads, 2, d/2) to (heads, d/2, 2). Rows of other modules stay as they are.
    """
    linear = base.family.linears.get(within_block(base, module)[1]) if module in base.linears else None
    if linear is None or not linear.heads:
        return rows
    heads = getattr(base, linear.heads)
    swapped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2)
    return swapped.reshape(rows.shape)


def weights(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder's safetensors files by name, mapped and not read.

    Raises:
        BadModel: files are missing or not sound, or do not agree with the index.
    """
    found: dict[str, Array] = {}
    for file in _weight_files(folder):
        for name, tensor in tensors.read(file)[0].items():
            if name in found:
                raise BadModel(f"{folder}: two files hold the tensor {name}")
            found[name] = tensor
    return found


def model_files(folder: Path) -> list[Path]:
    """The files that a client needs to train from this folder, sorted by name.

    Raises:
        BadModel: the weights are missing.
    """
    files = [_folder(folder) / name for name in _FILES]
    if not (folder / _SINGLE).is_file():
        files.append(folder / _INDEX)
    return sorted([file for file in files if file.is_file()] + _weight_files(folder))


@functools.lru_cache(maxsize=8)
def _names(arch: str, n_layers: int) -> Any:
    numbers: dict[str, Any] = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[arch], n_layers)


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadModel(f"the base model {folder} is not a folder")
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """One file, or those that the index names; the order of preference is transformers'."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise BadModel(
            f"{folder} has no weights in safetensors form, neither {_SINGLE} nor {_INDEX}",
            hint="pickled checkpoints (.bin, .pt) can run code and are not read; save the model as safetensors",
        )
    index: Settings = settings.read(folder / _INDEX, BadModel)
    parts = set()
    for part in index.table("weight_map").values.values():
        if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
            raise index.bad(f"{part!r} is not the name of a safetensors file beside it")
        parts.add(part)
    missing = sorted(part for part in parts if not (folder / part).is_file())
    if missing or not parts:
        raise BadModel(f"{folder}: {len(missing)} of {len(parts)} weight files are missing: {', '.join(missing[:3])}")
    return [folder / part for part in sorted(parts)]


def _check_weights(folder: Path, family: Family, linears: Mapping[str, Shape], vocabulary: Shape, tied: bool) -> str:
    """Hold the config's shapes against the files; returns the matrices' dtype."""
    found = weights(folder)
    expected = {f"{name}.weight": shape for name, shape in linears.items()}
    expected[f"{family.embedding}.weight"] = vocabulary
    if not tied:
        expected[f"{family.output}.weight"] = vocabulary
    for name, shape in expected.items():
        if name not in found:
            raise BadModel(f"{folder}: config.json asks for a tensor {name} that no weight file holds")
        if found[name].shape != shape:
            raise BadModel(f"{folder}: {name} is {found[name].shape}, config.json makes it {tuple(shape)}")
        if found[name].dtype.name not in _DTYPES:
            raise BadModel(f"{folder}: {name} is {found[name].dtype}; expected float32, float16 or bfloat16")
    return _DTYPES[found[next(iter(expected))].dtype.name]
