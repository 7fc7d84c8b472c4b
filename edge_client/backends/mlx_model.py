"""A base model as MLX trains over it: loaded by mlx-lm, rounded if asked, its layers checkpointed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from converters import checkpoint, custom_code, settings
from converters.settings import Settings
from edge_client.training.recipe import Setup
from oneround.errors import BadModel

_GROUP = 64  # weights of a quantised row that share a scale


def load(base: Path, setup: Setup) -> Any:
    """A language model, frozen. In evaluation mode: LoRA's dropout is the recipe's, the base's own would not be.

    Raises:
        BadModel: the folder holds no model that mlx-lm can load.
    """
    custom_code.check(base)
    rope = _rope(settings.read(base / "config.json", BadModel))
    try:
        checkpoint.weights(base)  # as MLX does not, this looks whether the headers are sound
        model, _ = load_model(base, lazy=True, model_config=rope)
    except MemoryError:
        raise
    except Exception as error:  # the settings are a stranger's, and over them the library raises anything
        raise BadModel(f"{base} holds no model that mlx-lm can load: {error}", hint=custom_code.hint(base)) from error
    model.set_dtype(getattr(mx, setup.precision))
    if setup.bits:
        nn.quantize(model, _GROUP, setup.bits, class_predicate=_can_be_rounded)
    model.freeze()
    return model.eval()


def _can_be_rounded(path: str, module: Any) -> bool:
    """As for PyTorch, embeddings and the output layer stay."""
    return isinstance(module, nn.Linear) and "lm_head" not in path and module.weight.shape[-1] % _GROUP == 0


def checkpoint_layers(model: Any) -> None:
    """Have decoder layers compute their activations again on the way back rather than keep them."""
    for layer in model.layers:
        forward = type(layer).__call__

        def again(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            seed_here, after = (int(seed) for seed in np.array(mx.random.randint(0, 1 << 30, (2,))))

            def run(weights: Any, *args: Any, **kwargs: Any) -> Any:
                mx.random.seed(seed_here)  # both times the same units drop out
                self.update(weights)
                return forward(self, *args, **kwargs)

            output = mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)
            mx.random.seed(after)
            return output

        layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": again})


def _rope(config: Settings) -> dict[str, Any]:
    """transformers 5 keeps what it knows of rope in `rope_parameters`; most models of mlx-lm look for it under the
    older keys, and fall back on their own defaults without a word."""
    ropes = config.table("rope_parameters")
    far = ropes.table("full_attention") if "full_attention" in ropes.values else ropes
    older = {key: far.values[key] for key in ("rope_theta", "partial_rotary_factor") if key in far.values}
    if (kind := far.text("rope_type", "default")) != "default":
        older["rope_scaling"] = {**far.values, "type": kind}
    if near := ropes.table("sliding_attention").values:
        older["rope_local_base_freq"] = near.get("rope_theta", 10000.0)
    return older
