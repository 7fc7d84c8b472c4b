"""Adapters that mlx-lm itself trains: over quantised bases, of the last layers, on switch layers of experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.models import mixtral, qwen2_moe
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from converters import adapter, architectures, experts, mlx, peft
from converters.adapter import Adapter, LowRank
from oneround.errors import LayoutMismatch

BASE = Path(__file__).parents[2] / "benchmarks" / "base"

mx.set_default_device(mx.cpu)


def trained(model: Any, folder: Path, num_layers: int, parameters: dict[str, Any]) -> Path:
    """What mlx-lm saves, with factors that are not zero."""
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters)
    mx.random.seed(0)
    for _, layer in model.named_modules():
        if isinstance(layer, LoRALinear | LoRASwitchLinear):
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PARAMETERS = {"rank": 3, "scale": 20.0, "dropout": 0.0}


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path: Path, bits: int) -> None:
    model, _ = load(str(BASE))
    nn.quantize(model, group_size=32, bits=bits)
    folder = trained(model, tmp_path / "mlx", -1, PARAMETERS)
    found = mlx.read(folder)
    assert found.modules.keys() == architectures.describe(BASE).linears.keys()
    rng = np.random.default_rng(0)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            assert isinstance(layer.linear, nn.QuantizedLinear)
            update = found.modules[name]
            x = mx.array(rng.normal(size=(2, update.shape.into)).astype(np.float32))
            theirs = np.array(layer.scale * ((x @ layer.lora_a) @ layer.lora_b))
            np.testing.assert_allclose(np.array(x) @ update.delta().T, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("num_layers", "blocks"), [(2, {3, 4}), (0, {0, 1, 2, 3, 4}), (-1, {0, 1, 2, 3, 4}), (99, {0, 1, 2, 3, 4})]
)
def test_num_layers_and_keys(tmp_path: Path, num_layers: int, blocks: set[int]) -> None:
    model, _ = load(str(BASE))
    keys = ["self_attn.q_proj", "mlp.down_proj"]
    found = mlx.read(trained(model, tmp_path / "mlx", num_layers, {**PARAMETERS, "keys": keys}))
    assert found.modules.keys() == {f"model.layers.{n}.{key}" for n in blocks for key in keys}


def test_what_we_write_generates(tmp_path: Path) -> None:
    base = architectures.describe(BASE)
    update = adapter.initial({name: shape for name, shape in base.linears.items() if ".2." in name}, 2, 0)
    mlx.write(update, tmp_path / "mlx", base)
    model, tokenizer = load(str(BASE), adapter_path=str(tmp_path / "mlx"))
    plain, _ = load(str(BASE))
    text = [generate(which, tokenizer, prompt="def main(", max_tokens=6) for which in (model, plain)]
    assert text[0] == text[1], "B is zero, so ΔW is"


MOE = {
    "qwen2_moe": (
        qwen2_moe,
        {"model_type": "qwen2_moe", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_experts": 4,
         "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48, "rms_norm_eps": 1e-5, "vocab_size": 64,
         "rope_theta": 10000.0},
        "model.layers.1.mlp.experts.3.up_proj",
    ),
    "mixtral": (
        mixtral,
        {"model_type": "mixtral", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4,
         "vocab_size": 64},
        "model.layers.1.block_sparse_moe.experts.3.w3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MOE)
def test_switch_layers(tmp_path: Path, family: str) -> None:
    module, config, name = MOE[family]
    model = module.Model(module.ModelArgs.from_dict(config))
    folder = trained(model, tmp_path / "mlx", -1, PARAMETERS)
    found = mlx.read(folder)
    assert name in found.modules and found.modules[name].shape == (24, 32)
    for switch, layer in model.named_modules():
        if isinstance(layer, LoRASwitchLinear):
            theirs = np.array(layer.fuse().weight - layer.linear.weight)
            for n, expert in enumerate(experts.of_switch(switch, len(theirs)) or []):
                np.testing.assert_allclose(found.modules[expert].delta(), theirs[n], rtol=0, atol=1e-5)

    # Back again, through the common layout: the same model to mlx-lm.
    adapter.write(found, tmp_path / "common.safetensors")
    linears = {name: shape for name, shape in found.shapes.items() if not experts.is_expert(name)}
    base = replace(architectures.describe(BASE), config=config, n_layers=2, linears=linears)
    mlx.write(adapter.read(tmp_path / "common.safetensors"), tmp_path / "again", base)
    again = module.Model(module.ModelArgs.from_dict(config))
    again.load_weights([(name.replace(".linear.", "."), value) for name, value in tree_flatten(model.parameters())
                        if "lora_" not in name])  # fmt: skip
    load_adapters(again, str(tmp_path / "again"))
    prompt = mx.array([[5, 17, 33, 8, 1]])
    expected = np.array(model(prompt))
    np.testing.assert_allclose(np.array(again(prompt)), expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    with pytest.raises(LayoutMismatch, match=r"is one expert of many"):
        peft.write(found, tmp_path / "peft", base_model="x")
    assert not (tmp_path / "peft").exists()


def test_experts_that_the_base_does_not_have(tmp_path: Path) -> None:
    base = architectures.describe(BASE)
    one = LowRank(np.ones((2, 32), np.float32), np.ones((24, 2), np.float32))
    wide = LowRank(np.ones((2, 33), np.float32), np.ones((24, 2), np.float32))
    name = "model.layers.0.mlp.experts.{}.up_proj"
    with pytest.raises(LayoutMismatch, match="the base has none"):
        mlx.write(Adapter({name.format(0): one}), tmp_path / "mlx", base)
    moe = replace(base, config={"num_experts": 4})
    with pytest.raises(LayoutMismatch, match="no expert 4"):
        mlx.write(Adapter({name.format(4): one}), tmp_path / "mlx", moe)
    with pytest.raises(LayoutMismatch, match="not of one shape"):
        mlx.write(Adapter({name.format(0): one, name.format(1): wide}), tmp_path / "mlx", moe)
