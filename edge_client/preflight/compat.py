"""Where mlx-lm 0.32 computes something else than transformers. Better refused than averaged with what others made.

A sliding window is not looked at but in Gemma 3, so texts that are longer than it differ. LongRoPE has its factors for
long texts at every length. Gemma 3's text models have no final soft cap, which none of Google's has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from converters import checkpoint
from converters.settings import Settings
from oneround.errors import UsageError

# The window where config.json has no word of it: transformers' own defaults. 0: none.
_WINDOWS = {"mistral": 4096, "gemma2": 4096, "phi3": 0, "qwen2": 4096, "qwen3": 4096}


def check(backend: str, base: Path, lengths: Iterable[int]) -> None:
    """Whether a backend computes what the base's own config says, for examples of so many tokens.

    Raises:
        UsageError: it does not.
    """
    why = _of_mlx(checkpoint.config(base), sorted(lengths)) if backend == "mlx" else ""
    if why:
        raise UsageError(
            f"mlx-lm computes something else than this base model: {why}",
            hint="pip install 'oneround[torch]', and edge-client join --backend torch",
        )


def _of_mlx(config: Settings, lengths: Sequence[int]) -> str:
    shortest, longest = lengths[0] - 1, lengths[-1] - 1  # the last token is a target only
    kind = config.text("model_type", "")
    slides = kind in _WINDOWS and (not kind.startswith("qwen") or config.flag("use_sliding_window"))
    window = config.values.get("sliding_window", _WINDOWS[kind]) if slides else 0  # null: none
    if isinstance(window, int) and 0 < window < longest:
        return f"it has no sliding window for {kind}, and there is text of more than {window} tokens"
    rope = config.table("rope_parameters" if config.get("rope_parameters") else "rope_scaling")
    is_long = rope.text("rope_type", rope.text("type", "")) in ("longrope", "su")
    if is_long and rope.get("short_factor") != rope.get("long_factor"):
        most = config.integer("original_max_position_embeddings", 0, low=0)
        most = most or rope.integer("original_max_position_embeddings", 0, low=0)
        if shortest <= most:
            return f"its LongRoPE takes every text for one of more than {most} tokens"
    if kind == "gemma3_text" and config.get("final_logit_softcapping"):
        return "it has no final soft cap for gemma3_text"
    return ""
