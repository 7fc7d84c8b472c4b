"""A model's hyperparameters as GGUF keys, and the divisors of its rotary frequencies: one function a family.

Where llama.cpp does not read something from the file but has it in its code, the config has to say the same; where it
says otherwise, llama.cpp would give other outputs than the model that clients train, and that is an error here.

Sources: llama.cpp, conversion/{base,llama,qwen,gemma,phi}.py for the keys, src/models and src/llama-context.cpp for
what is fixed; transformers, modeling_rope_utils.py for the frequencies and the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from converters.families import Base
from converters.settings import Settings
from oneround.errors import BadModel

Factors = dict[str, NDArray[np.float32]]  # tensors that the checkpoint does not have, by their name in GGUF
_NUMBERS = {  # of yarn, with the writer's method
    "extrapolation_factor": "add_rope_scaling_yarn_ext_factor",
    "attention_factor": "add_rope_scaling_yarn_attn_factor",
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}


def add(writer: GGUFWriter, base: Base, config: Settings) -> Factors:
    """Add a model's hyperparameters to a GGUF's keys; returns the tensors that go with them.

    Raises:
        BadModel: a value is missing or not sound, or llama.cpp computes something else.
    """
    writer.add_block_count(base.n_layers)
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(base.hidden_size)
    writer.add_feed_forward_length(base.intermediate_size)
    writer.add_head_count(base.n_heads)
    writer.add_head_count_kv(base.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6))
    return WRITERS[base.arch](writer, base, config)


def _llama(writer: GGUFWriter, base: Base, config: Settings) -> Factors:
    _head_lengths(writer, base)
    writer.add_rope_dimension_count(base.head_dim)
    writer.add_vocab_size(base.vocab_size)
    rope = _rope(config)
    if _rope_type(rope) == "llama3":
        writer.add_rope_freq_base(_theta(rope, config))
        return {"rope_freqs.weight": _llama3_factors(rope, _theta(rope, config), base.head_dim)}
    _rope_keys(writer, rope, config, ("default", "linear", "yarn"))
    return {}


def _qwen(writer: GGUFWriter, base: Base, config: Settings) -> Factors:
    if config.get("head_dim"):
        _head_lengths(writer, base)
    _rope_keys(writer, _rope(config), config, ("default", "linear", "yarn"))
    return {}


def _gemma2(writer: GGUFWriter, base: Base, config: Settings) -> Factors:
    _head_lengths(writer, base)
    _check_gemma(base, config, size_27b=46)
    if "sliding_attention" not in _windows(base, config, 2):
        raise config.bad("llama.cpp has a sliding window in every second layer of gemma2")
    writer.add_sliding_window(config.integer("sliding_window"))
    for key, method in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        method(config.number(key))
    rope = _rope(config)
    if _rope_type(rope) != "default":
        raise config.bad(f"llama.cpp has no rope scaling for {base.arch}")
    if (theta := _theta(rope, config)) != 10000.0:
        writer.add_rope_freq_base(theta)
    return {}


def _gemma3(writer: GGUFWriter, base: Base, config: Settings) -> Factors:
    _head_lengths(writer, base)
    _check_gemma(base, config, size_27b=62)
    if config.get("attn_logit_softcapping") is not None:
        raise config.bad("llama.cpp has no attn_logit_softcapping for gemma3")
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config.number("final_logit_softcapping"))
    if "sliding_attention" in _windows(base, config, 6):
        writer.add_sliding_window(config.integer("sliding_window"))

    # One rope for layers that see everything, and one for layers with a window, which is never scaled.
    ropes = config.table("rope_parameters")
    near = ropes.table("sliding_attention")
    if _rope_type(near) != "default":
        raise config.bad("llama.cpp has no rope scaling for gemma3's sliding layers")
    writer.add_rope_freq_base_swa(near.number("rope_theta", config.number("rope_local_base_freq", 10000.0)))
    far = ropes.table("full_attention") if ropes.values else config.table("rope_scaling")
    _rope_keys(writer, far, config, ("default", "linear"), theta=1000000.0)
    return {}


def _phi3(writer: GGUFWriter, base: Base, config: Settings) -> Factors:
    rope = _rope(config)
    part = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotated = int(base.head_dim * min(part, 1.0))
    if rotated < 2 or rotated % 2:
        raise config.bad(f"partial_rotary_factor {part} does not go with heads of {base.head_dim}")
    original = config.integer("original_max_position_embeddings", low=2)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(_theta(rope, config))
    writer.add_rope_scaling_orig_ctx_len(original)
    # llama.cpp takes no notice of the window, and tells Phi-4 by a 0 here.
    writer.add_sliding_window(config.integer("sliding_window", 0, low=0))
    match _rope_type(rope):
        case "default":
            return {}
        case "longrope" | "su" | "yarn":  # transformers takes the older names for longrope too
            writer.add_rope_scaling_attn_factors(_longrope_attention(rope, config, original))
            return {
                f"rope_factors_{length}.weight": _longrope_factors(rope, f"{length}_factor", rotated // 2)
                for length in ("long", "short")
            }
        case other:
            raise config.bad(f"llama.cpp has no rope scaling of type {other!r} for phi3")


WRITERS: dict[str, Callable[[GGUFWriter, Base, Settings], Factors]] = {  # by general.architecture
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _head_lengths(writer: GGUFWriter, base: Base) -> None:
    writer.add_key_length(base.head_dim)
    writer.add_value_length(base.head_dim)


def _check_gemma(base: Base, config: Settings, size_27b: int) -> None:
    """llama.cpp divides by √head_dim, and in the 27B models, which it tells by their layers, as their heads go into
    the hidden size."""
    expected = base.hidden_size // base.n_heads if base.n_layers == size_27b else base.head_dim
    if (scalar := config.number("query_pre_attn_scalar")) != expected:
        raise config.bad(f"query_pre_attn_scalar is {scalar:g}, and llama.cpp takes {expected} for it")
    if config.flag("use_bidirectional_attention"):
        raise config.bad(f"llama.cpp has no {base.arch} with bidirectional attention")


def _windows(base: Base, config: Settings, every: int) -> set[str]:
    """The kinds of the layers, which have to be all full, or sliding with a full one `every` so many."""
    pattern = config.integer("sliding_window_pattern", every, high=1 << 12)
    regular = [_kind(n, every) for n in range(base.n_layers)]
    kinds = config.items("layer_types") or [_kind(n, pattern) for n in range(base.n_layers)]
    if kinds not in (regular, ["full_attention"] * base.n_layers):
        raise config.bad(f"llama.cpp has a full layer after {every - 1} sliding ones")
    return set(kinds)


def _kind(layer: int, every: int) -> str:
    return "sliding_attention" if (layer + 1) % every else "full_attention"


def _rope(config: Settings) -> Settings:
    """transformers 5 has `rope_parameters`, earlier versions `rope_scaling` beside `rope_theta`."""
    return config.table("rope_parameters" if config.get("rope_parameters") else "rope_scaling")


def _rope_type(rope: Settings) -> str:
    return rope.text("rope_type", rope.text("type", "default"))


def _theta(rope: Settings, config: Settings, default: float = 10000.0) -> float:
    return rope.number("rope_theta", config.number("rope_theta", default))


def _rope_keys(
    writer: GGUFWriter, rope: Settings, config: Settings, supported: tuple[str, ...], theta: float = 10000.0
) -> None:
    """Base frequency, and scaling of a kind that needs no tensor."""
    writer.add_rope_freq_base(_theta(rope, config, theta))
    kind = _rope_type(rope)
    if kind not in supported:
        raise config.bad(f"llama.cpp has no rope scaling of type {kind!r} for this model")
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor := rope.number("factor"))
    if kind == "yarn":
        context = config.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
        writer.add_rope_scaling_orig_ctx_len(rope.integer("original_max_position_embeddings", context))
        _check_yarn(rope, factor)
        for key, method in _NUMBERS.items():
            if rope.get(key) is not None:
                getattr(writer, method)(rope.number(key, positive=False))


def _check_yarn(rope: Settings, factor: float) -> None:
    """llama.cpp scales attention by the factor alone, and rounds the corrected range outwards."""
    usual = 0.1 * math.log(max(factor, 1.0)) + 1.0
    if not math.isclose(rope.number("attention_factor", usual), usual, rel_tol=1e-4):
        raise rope.bad(f"attention_factor is not {usual:g}, which llama.cpp takes for it")
    if rope.get("mscale") or rope.get("mscale_all_dim") or not rope.flag("truncate", True):
        raise rope.bad("llama.cpp has no mscale and no truncate = false for this model")


def _llama3_factors(rope: Settings, theta: float, head_dim: int) -> NDArray[np.float32]:
    """Llama 3's divisors of the rotary frequencies, (head_dim / 2,).

    Source: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    context = rope.integer("original_max_position_embeddings", 8192)
    if low >= high:
        raise rope.bad(f"low_freq_factor {low} is not below high_freq_factor {high}")
    with np.errstate(all="ignore"):
        wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = (context / wavelengths - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return _finite(factors, rope)


def _finite(factors: NDArray[np.float64], rope: Settings) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = factors.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise rope.bad("the divisors of the rotary frequencies are not finite")
    return rounded


def _longrope_factors(rope: Settings, key: str, count: int) -> NDArray[np.float32]:
    factors: list[Any] = rope.items(key)
    if len(factors) != count:
        raise rope.bad(f"{key} has {len(factors)} numbers; expected {count}")
    listed = Settings({str(n): factor for n, factor in enumerate(factors)}, f"{rope.source}: {key}", BadModel)
    return _finite(np.array([listed.number(str(n)) for n in range(count)]), rope)


def _longrope_attention(rope: Settings, config: Settings, original: int) -> float:
    """What queries and keys are multiplied by. Source: transformers, _compute_longrope_parameters."""
    factor = rope.number("factor", config.integer("max_position_embeddings") / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return rope.number("attention_factor", usual)
