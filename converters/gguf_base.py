"""A base GGUF from a Hugging Face folder, for the families in `architectures`.

Keys and tensors are those of llama.cpp's convert_hf_to_gguf.py, except where that file would not serve the model that
clients train:

- `tokenizer.ggml.add_bos_token` is always written; the script leaves it out where the tokenizer's files say nothing,
  and llama.cpp then adds a BOS for some tokenizers that have none.
- A tied model's `lm_head.weight` is left out, as transformers leaves it out; the script writes it when a file has one.
- Without an output type the checkpoint's own is kept; the script makes float32 into float16.
- A SentencePiece-style tokenizer.json without tokenizer.model gets scores from its merges; the script gives every
  token the same score, with which llama.cpp does not merge in the tokenizer's order.
- Llama 3's `rope_freqs.weight` is worked out in float64; the script's float32 is off by up to 2e-7, relatively.
- CodeLlama's infill tokens are not written, and BOS is not turned off by a vocabulary's size (49152) alone.

Source: llama.cpp, conversion/base.py and conversion/llama.py, at llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from converters import architectures, gguf_file, tokenizer
from converters.architectures import Base
from converters.errors import BadModel
from converters.gguf_file import FLOATS, Info
from converters.settings import Settings
from converters.tensors import Array

_LEFT_OUT = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


def build(folder: Path, path: Path, dtype: str | None = None) -> None:
    """Write a base GGUF; matrices in `dtype` ("f32", "f16", "bf16"), by default the checkpoint's own, norms in float32.

    Raises:
        BadModel: the folder's files are missing, not sound, or of a family or tokenizer that is not known here.
        NotEnough: the disk is full.
    """
    base = architectures.describe(folder)
    dtype = dtype or base.dtype
    if dtype not in FLOATS:
        raise BadModel(f"a base GGUF is {', '.join(FLOATS)}, not {dtype}")
    weights = _named(base, architectures.weights(folder))
    config = Settings(base.config, str(folder / "config.json"), BadModel)
    factors = _rope_factors(base, config)
    infos = [] if factors is None else [Info("rope_freqs.weight", factors.shape, FLOATS["f32"].type)]
    infos += [Info(new, tensor.shape, FLOATS[_type(new, tensor, dtype)].type) for new, (_, tensor) in weights.items()]

    writer = gguf.GGUFWriter(None, base.arch)
    _general(writer, folder, infos)
    _llama(writer, base, config)
    writer.add_file_type(FLOATS[dtype].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizer.add(writer, folder, base.vocab_size)

    def data() -> Iterator[NDArray[Any]]:
        if factors is not None:
            yield factors
        for new, (old, tensor) in weights.items():
            rows = architectures.interleave(base, old.rpartition(".")[0], tensor)
            yield rows.astype(FLOATS[_type(new, tensor, dtype)].dtype, copy=False)

    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_file.write(path, gguf_file.keys_of(writer), infos, data())


def _named(base: Base, weights: dict[str, Array]) -> dict[str, tuple[str, Array]]:
    """Tensors by their name in GGUF, with the name they had."""
    named: dict[str, tuple[str, Array]] = {}
    for old, tensor in weights.items():
        if old.endswith(_LEFT_OUT) or (base.tied and old == f"{base.family.output}.weight"):
            continue
        if (
            tensor.dtype not in [known.dtype for known in FLOATS.values()]
            or tensor.ndim not in (1, 2)
            or 0 in tensor.shape
        ):
            raise BadModel(
                f"the tensor {old} is {tensor.dtype} {tensor.shape}; expected vectors and matrices of floats"
            )
        new = architectures.gguf_name(base, old)
        if new in named:
            raise BadModel(f"the tensors {old} and {named[new][0]} are both {new} in GGUF")
        named[new] = old, tensor
    return named


def _type(name: str, tensor: Array, dtype: str) -> str:
    """llama.cpp wants vectors and norms in float32, whatever the matrices are."""
    return "f32" if tensor.ndim < 2 or not name.endswith(".weight") or name.endswith("_norm.weight") else dtype


def _general(writer: gguf.GGUFWriter, folder: Path, infos: list[Info]) -> None:
    total = sum(prod(info.shape) for info in infos)
    try:
        metadata = gguf.Metadata.load(None, folder, None, total)
    except Exception as error:  # a model card may hold anything, and gguf trusts it
        raise BadModel(f"{folder}: the model card is not understood: {error}") from error
    metadata.name = metadata.name or folder.name
    metadata.size_label = metadata.size_label or gguf.size_label(total, total, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _llama(writer: gguf.GGUFWriter, base: Base, config: Settings) -> None:
    """Hyperparameters; the defaults are transformers' LlamaConfig's."""
    writer.add_block_count(base.n_layers)
    writer.add_context_length(config.integer("max_position_embeddings", 2048))
    writer.add_embedding_length(base.hidden_size)
    writer.add_feed_forward_length(base.intermediate_size)
    writer.add_head_count(base.n_heads)
    writer.add_head_count_kv(base.n_kv_heads)
    writer.add_key_length(base.head_dim)
    writer.add_value_length(base.head_dim)
    writer.add_rope_dimension_count(base.head_dim)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6))
    writer.add_vocab_size(base.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope.number("rope_theta", config.number("rope_theta", 10000.0)))
    match rope.text("rope_type", rope.text("type", "default")):
        case "default" | "llama3":
            pass  # llama3 is in the tensor rope_freqs.weight
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.number("factor"))
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope.number("factor"))
            writer.add_rope_scaling_orig_ctx_len(_original_context(rope, config))
        case other:
            raise config.bad(f"llama.cpp has no rope scaling of type {other!r} for {base.arch}")


def _rope(config: Settings) -> Settings:
    """transformers 5 has `rope_parameters`, earlier versions `rope_scaling` beside `rope_theta`."""
    return config.table("rope_parameters" if config.get("rope_parameters") else "rope_scaling")


def _original_context(rope: Settings, config: Settings) -> int:
    default = config.integer("original_max_position_embeddings", config.integer("max_position_embeddings", 2048))
    return rope.integer("original_max_position_embeddings", default)


def _rope_factors(base: Base, config: Settings) -> NDArray[np.float32] | None:
    """Llama 3's divisors of the rotary frequencies, (head_dim / 2,); None for other kinds of rope.

    Source: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    rope = _rope(config)
    if rope.text("rope_type", rope.text("type", "default")) != "llama3":
        return None
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    context = rope.integer("original_max_position_embeddings", 8192)
    if low >= high:
        raise rope.bad(f"low_freq_factor {low} is not below high_freq_factor {high}")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, base.head_dim, 2) / base.head_dim)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return factors.astype(np.float32)
