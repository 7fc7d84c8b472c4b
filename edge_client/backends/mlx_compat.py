"""Where mlx-lm 0.32 computes something else than transformers. Better refused than averaged with what others made.

A sliding window is not looked at but in Gemma 3, so texts that are longer than it differ. LongRoPE has its factors for
long texts at every length. Gemma 3's text models have no final soft cap, which none of Google's has.
"""

from __future__ import annotations

from collections.abc import Sequence

from converters.settings import Settings

# The window where config.json has no word of it: transformers' own defaults. 0: none.
_WINDOWS = {"mistral": 4096, "gemma2": 4096, "phi3": 0, "qwen2": 4096, "qwen3": 4096}


def gap(config: Settings, lengths: Sequence[int]) -> str:
    """How mlx-lm differs from a base's own config.json, for examples of so many tokens; empty where it does not."""
    kind = config.text("model_type", "")
    if lengths:
        shortest, longest = min(lengths) - 1, max(lengths) - 1  # the last token is a target only
        if difference := _window(config, kind, longest) or _long_rope(config, shortest):
            return difference
    if kind == "gemma3_text" and config.get("final_logit_softcapping"):
        return "it has no final soft cap for gemma3_text"
    return ""


def _window(config: Settings, kind: str, longest: int) -> str:
    slides = kind in _WINDOWS and (not kind.startswith("qwen") or config.flag("use_sliding_window"))
    window = config.values.get("sliding_window", _WINDOWS[kind]) if slides else 0  # null: none
    if isinstance(window, int) and 0 < window < longest:
        return f"it has no sliding window for {kind}, and there is text of more than {window} tokens"
    return ""


def _long_rope(config: Settings, shortest: int) -> str:
    rope = config.table("rope_parameters" if config.get("rope_parameters") else "rope_scaling")
    is_long = rope.text("rope_type", rope.text("type", "")) in ("longrope", "su")
    if not is_long or rope.get("short_factor") == rope.get("long_factor"):
        return ""
    most = config.integer("original_max_position_embeddings", 0, low=0)
    most = most or rope.integer("original_max_position_embeddings", 0, low=0)
    return f"its LongRoPE takes every text for one of more than {most} tokens" if shortest <= most else ""
