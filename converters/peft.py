"""PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.NAME.lora_A.weight` (r, in) and `….lora_B.weight` (out, r), and ΔW is
alpha/r · B @ A, or alpha/√r · B @ A with `use_rslora`; `rank_pattern` and `alpha_pattern` override per module.

Source: peft 0.21, tuners/lora/config.py (settings), layer.py (scaling).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from converters import checkpoint, experts, patterns, settings, tensors
from converters.adapter import Adapter, LowRank, pair
from converters.settings import Settings
from oneround import files
from oneround.errors import BadAdapter, LayoutMismatch

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX, _PICKLE = f"{_WEIGHTS}.index.json", "adapter_model.bin"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

# Settings that change what the adapter computes, or mean that weights other than A and B were trained.
_REFUSED = {
    "use_dora": "DoRA magnitudes",
    "lora_bias": "biases on lora_B",
    "modules_to_save": "whole modules saved beside the adapter",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on parameters that are not linear layers",
    "layer_replication": "a base with repeated layers",
    "alora_invocation_tokens": "activation by invocation tokens",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "routing between adapters",
    "monteclora_config": "sampled factors",
    "kasa_config": "singular values between A and B",
    "megatron_config": "layers split by Megatron",
}
# Settings that say how the adapter was trained or where it applies; the tensors' names say the latter again.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
}
# Starting points that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the start out of the base.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_TENSORS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_B.bias": "a bias on lora_B",
    "lora_embedding_": "LoRA on an embedding",
    "base_layer": "a weight of the base",
    "modules_to_save": "a whole module",
    "token_adapter": "trained token embeddings",
}


def read(folder: Path) -> Adapter:
    """Read a PEFT adapter, with its scaling folded into B.

    Raises:
        BadAdapter: files missing or not sound, or a setting or tensor that the common layout cannot hold, by name.
    """
    config = settings.read(folder / _CONFIG, BadAdapter)
    _refuse(config)
    halves: dict[str, dict[str, tensors.Array]] = {_A: {}, _B: {}}
    for name, tensor in _weights(folder):
        suffix = _A if name.endswith(_A) else _B if name.endswith(_B) else ""
        if not suffix or not name.startswith(_PREFIX):
            why = next((why for part, why in _TENSORS.items() if part in name), "not a LoRA factor of a linear layer")
            raise BadAdapter(f"{folder / _WEIGHTS}: the tensor {name} is {why}, which cannot be converted")
        halves[suffix][name.removeprefix(_PREFIX).removesuffix(suffix)] = tensor
    factors = pair(halves[_A], halves[_B], folder / _WEIGHTS)
    scaling = _Scaling(config, factors)
    return Adapter({name: LowRank(a, b, scaling.of(name, a.shape[0])) for name, (a, b) in factors.items()})


def _weights(folder: Path) -> Iterator[tuple[str, tensors.Array]]:
    """Every tensor by name, from one file or from those that an index names."""
    parts = [folder / _WEIGHTS]
    if not parts[0].is_file() and (folder / _INDEX).is_file():
        parts = checkpoint.parts(folder / _INDEX, BadAdapter)
    elif not parts[0].is_file() and (folder / _PICKLE).is_file():
        raise BadAdapter(
            f"{folder} has its weights in {_PICKLE}, a pickle, which can run code and is not read",
            hint="load it with PEFT where you trust it, and save_pretrained(..., safe_serialization=True)",
        )
    seen: set[str] = set()
    for file in parts:
        for name, tensor in tensors.read(file)[0].items():
            if name in seen:
                raise BadAdapter(f"{folder}: two files hold the tensor {name}")
            seen.add(name)
            yield name, tensor


def write(adapter: Adapter, folder: Path, *, base_model: str) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads: float32, scaling 1, every module by its whole name.

    Raises:
        LayoutMismatch: there are experts among the modules; transformers 5 keeps those of a layer in one tensor, which
            PEFT does not adapt expert by expert.
    """
    if (expert := next(filter(experts.is_expert, adapter.modules), None)) is not None:
        raise LayoutMismatch(
            f"{expert} is one expert of many; PEFT has no adapter for single experts with transformers 5",
            hint="convert to mlx, which has",
        )
    folder.mkdir(parents=True, exist_ok=True)
    factors: dict[str, tensors.Later] = {}
    for name, update in adapter.modules.items():
        factors[f"{_PREFIX}{name}{_A}"], factors[f"{_PREFIX}{name}{_B}"] = update.later()
    ranks = adapter.ranks
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in sorted(ranks.items()) if other != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # alpha/r = 1: all scaling is in B
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }
    tensors.write(folder / _WEIGHTS, factors, {"format": "pt"})  # transformers and PEFT look for this `format`
    files.replace(folder / _CONFIG, [json.dumps(config, indent=2).encode()])


class _Scaling:
    """alpha/r per module, as PEFT works it out when it builds the layers."""

    def __init__(self, config: Settings, modules: Collection[str]) -> None:
        self._config = config
        self._rank, self._alpha = config.integer("r", 8), config.number("lora_alpha", 8, positive=False)
        self._rslora = config.flag("use_rslora")
        self._ranks, self._alphas = config.table("rank_pattern"), config.table("alpha_pattern")
        self._rank_keys = patterns.first_keys(self._ranks, modules)
        self._alpha_keys = patterns.first_keys(self._alphas, modules)

    def of(self, module: str, stored: int) -> float:
        key = self._rank_keys.get(module)
        rank = self._rank if key is None else self._ranks.integer(key)
        key = self._alpha_keys.get(module)
        alpha = self._alpha if key is None else self._alphas.number(key, positive=False)
        if rank != stored:
            raise self._config.bad(f"{module} has rank {rank} by the settings, and {stored} in the file")
        return alpha / (math.sqrt(rank) if self._rslora else rank)


def _refuse(config: Settings) -> None:
    if (kind := config.text("peft_type", "LORA")) != "LORA":
        raise config.bad(f"peft_type is {kind}; only LORA can be converted")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise config.bad(f"{key} is set, which means {why}; that cannot be converted")
    if (bias := config.text("bias", "none")) != "none":
        raise config.bad(f"bias is {bias!r}: trained biases cannot be converted")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise config.bad(
            f"init_lora_weights is {init!r}, which rewrites the base model; that cannot be converted",
            hint="PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes it a plain LoRA",
        )
    checked = _HARMLESS | _REFUSED.keys() | {"bias", "init_lora_weights"}
    for key, value in config.values.items():
        if value and key not in checked:
            raise config.bad(f"the setting {key} is not known here, and may change what the adapter computes")
