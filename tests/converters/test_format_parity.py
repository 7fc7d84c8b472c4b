"""A PEFT adapter, converted to every format, gives the logits that it gave in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save_file
from transformers import AutoModelForCausalLM

from converters import adapter, architectures, llama, mlx, peft
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import merge as gguf_merge
from converters.gguf import quantize as gguf_quantize
from tests.converters import tiny

BOUND = 1e-4  # of logits of about ±4; measured: at most 1e-5 in torch, MLX and llama.cpp

ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2, r"layers\.[12]\.mlp\.up_proj": 7, "^model.layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 3, r"layers\.1\..*": 21},
    },
    "some layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "o_proj", "gate_proj"]},
}


@pytest.fixture(params=ADAPTERS)
def original(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tiny.save_adapter(tmp_path / "original", base, **ADAPTERS[request.param])


def test_every_format_gives_the_logits_of_the_original(base: Path, original: Path, tmp_path: Path) -> None:
    expected = tiny.torch_logits(base, original)
    assert np.abs(expected - tiny.torch_logits(base)).max() > 0.5  # the adapter does something

    described, common = architectures.describe(base), tmp_path / "common.safetensors"
    adapter.write(peft.read(original), common)
    ours = adapter.read(common)
    peft.write(ours, tmp_path / "peft", base_model=str(base))
    mlx.write(ours, tmp_path / "mlx", described)
    gguf_base.build(base, tmp_path / "base.gguf")
    gguf_adapter.write(ours, tmp_path / "adapter.gguf", described)
    gguf_merge.merge(tmp_path / "base.gguf", ours, tmp_path / "merged.gguf", "f32", described)

    by_transformers = AutoModelForCausalLM.from_pretrained(base).eval()
    by_transformers.load_adapter(str(tmp_path / "peft"))
    with torch.inference_mode():
        logits = by_transformers(torch.tensor([tiny.PROMPT])).logits[0].numpy()
    found = {
        "peft": tiny.torch_logits(base, tmp_path / "peft"),
        "transformers": logits,
        "mlx": tiny.mlx_logits(base, tmp_path / "mlx"),
        "gguf adapter": llama.logits(
            llama.load(tmp_path / "base.gguf", adapter=tmp_path / "adapter.gguf", context=64), tiny.PROMPT
        ),
        "merged gguf": llama.logits(llama.load(tmp_path / "merged.gguf", context=64), tiny.PROMPT),
    }
    differences = {name: float(np.abs(logits - expected).max()) for name, logits in found.items()}
    assert max(differences.values()) < BOUND, differences


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(0|2)\..*(q_proj|up_proj)", ["v_proj", "1.mlp.down_proj"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_peft_adapters_of_every_dtype_and_choice_of_modules(
    bases: dict[str, Path], tmp_path: Path, targets: Any, dtype: str
) -> None:
    """And in several files, as large ones may be."""
    base = bases["tied"]
    original = tiny.save_adapter(tmp_path / "original", base, target_modules=targets)
    whole = load_file(original / "adapter_model.safetensors")
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in whole.items()}
    torch_save_file(cast, original / "adapter_model.safetensors")
    expected = tiny.torch_logits(base, original)

    names = sorted(cast)
    parts = {name: f"adapter_model-{n % 2 + 1:05}-of-00002.safetensors" for n, name in enumerate(names)}
    for part in set(parts.values()):
        torch_save_file({name: cast[name] for name in names if parts[name] == part}, original / part)
    (original / "adapter_model.safetensors").unlink()
    (original / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    peft.write(peft.read(original), tmp_path / "again", base_model=str(base))
    assert np.abs(tiny.torch_logits(base, tmp_path / "again") - expected).max() < BOUND


def test_mlx_adapter_with_the_default_scale_gives_its_logits_in_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["untied"]
    rng = np.random.default_rng(3)
    found, scale, keys = {}, 20.0, ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    for name, (out, into) in architectures.describe(base).linears.items():
        if name.endswith(tuple(keys)) and not name.startswith("model.layers.0."):
            found[f"{name}.lora_a"] = rng.normal(size=(into, 3)).astype(np.float32) / 8
            found[f"{name}.lora_b"] = rng.normal(size=(3, out)).astype(np.float32) / 80
    folder = save_mlx(tmp_path / "mlx", found, scale, keys, num_layers=2)

    expected = tiny.mlx_logits(base, folder)
    assert np.abs(expected - tiny.mlx_logits(base)).max() > 0.5
    peft.write(mlx.read(folder), tmp_path / "peft", base_model=str(base))
    assert np.abs(tiny.torch_logits(base, tmp_path / "peft") - expected).max() < BOUND


def save_mlx(folder: Path, found: dict[str, np.ndarray], scale: float, keys: list[str], num_layers: int) -> Path:
    folder.mkdir()
    save_file(found, folder / "adapters.safetensors")
    parameters = {"rank": 3, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_factors_come_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """alpha/r is 2 here, which is exact in binary."""
    first = peft.read(tiny.save_adapter(tmp_path / "original", base, lora_alpha=8))
    peft.write(first, tmp_path / "peft", base_model="x")
    mlx.write(first, tmp_path / "mlx", architectures.describe(base))
    adapter.write(first, tmp_path / "common.safetensors")
    for again in (
        peft.read(tmp_path / "peft"),
        mlx.read(tmp_path / "mlx"),
        adapter.read(tmp_path / "common.safetensors"),
    ):
        assert again.modules.keys() == first.modules.keys()
        for name, factors in first.modules.items():
            assert np.array_equal(again.modules[name].a, factors.a)
            assert np.array_equal(again.modules[name].b, factors.b)


def test_mixed_ranks_are_padded_for_mlx_and_kept_for_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["tied"]
    first = peft.read(tiny.save_adapter(tmp_path / "original", base, rank_pattern={"k_proj": 2, "up_proj": 9}))
    peft.write(first, tmp_path / "peft", base_model="x")
    assert peft.read(tmp_path / "peft").ranks == first.ranks
    mlx.write(first, tmp_path / "mlx", architectures.describe(base))
    padded = mlx.read(tmp_path / "mlx")
    assert set(padded.ranks.values()) == {9}
    for name, factors in first.modules.items():
        np.testing.assert_allclose(padded.modules[name].delta(), factors.delta(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
def test_a_base_of_every_float_type(bases: dict[str, Path], tmp_path: Path, stored: str) -> None:
    """The stored weights plus ΔW, to every float type."""
    described = architectures.describe(bases["tied"])
    gguf_base.build(bases["tied"], tmp_path / "base.gguf", stored)
    update = peft.read(tiny.save_adapter(tmp_path / "original", bases["tied"]))
    base, module = gguf_file.read(tmp_path / "base.gguf"), "model.layers.1.self_attn.k_proj"
    delta = architectures.interleave(described, module, update.modules[module].delta())
    expected = gguf_file.to_float32(base.tensors["blk.1.attn_k.weight"]) + delta
    for dtype, relative in (("f32", 1e-6), ("f16", 2**-10), ("bf16", 2**-7)):
        gguf_merge.merge(tmp_path / "base.gguf", update, tmp_path / "out.gguf", dtype, described)
        out = gguf_file.read(tmp_path / "out.gguf")
        assert out.tensors["token_embd.weight"].info.type.name == dtype.upper()
        found = gguf_file.to_float32(out.tensors["blk.1.attn_k.weight"])
        np.testing.assert_allclose(found, expected, rtol=relative, atol=1e-6)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_merged_equals_merging_in_torch_and_building(base: Path, tmp_path: Path, dtype: str) -> None:
    original = tiny.save_adapter(tmp_path / "original", base)
    merged = tiny.torch_model(base, original).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny.save_tokenizer(tmp_path / "merged")
    gguf_base.build(tmp_path / "merged", tmp_path / "expected.gguf", "f32")
    gguf_base.build(base, tmp_path / "base.gguf")
    described = architectures.describe(base)
    gguf_merge.merge(tmp_path / "base.gguf", peft.read(original), tmp_path / "ours.gguf", dtype, described)

    expected, ours = gguf_file.read(tmp_path / "expected.gguf"), gguf_file.read(tmp_path / "ours.gguf")
    assert ours.value("general.file_type") == {"f32": 0, "f16": 1, "bf16": 32}[dtype]
    assert ours.tensors.keys() == expected.tensors.keys()
    # float32: summing a product in another order; the others: half a unit in the last place, and that order.
    relative = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}[dtype]
    for name, tensor in ours.tensors.items():
        right = gguf_file.to_float32(expected.tensors[name])
        np.testing.assert_allclose(gguf_file.to_float32(tensor), right, rtol=relative, atol=2e-7, err_msg=name)
        assert tensor.info.type.name == ("F32" if right.ndim == 1 else dtype.upper())


def test_half_precision_bases_are_rounded_once(bases: dict[str, Path], tmp_path: Path) -> None:
    """A bfloat16 checkpoint plus ΔW, summed in float32, is what float16 output rounds."""
    folder = tiny.save_model(tmp_path / "base", tiny.config(tied=True), torch.bfloat16)
    tiny.save_tokenizer(folder)
    described = architectures.describe(folder)
    update = peft.read(tiny.save_adapter(tmp_path / "original", folder))
    gguf_base.build(folder, tmp_path / "base.gguf")
    base = gguf_file.read(tmp_path / "base.gguf")
    assert base.tensors["blk.0.attn_q.weight"].info.type.name == "BF16"
    for dtype in ("f16", "bf16"):
        gguf_merge.merge(tmp_path / "base.gguf", update, tmp_path / "out.gguf", dtype, described)
        out = gguf_file.read(tmp_path / "out.gguf")
        for module, factors in update.modules.items():
            name = architectures.gguf_name(described, f"{module}.weight")
            exact = gguf_file.to_float32(base.tensors[name]) + architectures.interleave(
                described, module, factors.delta()
            )
            kind = gguf_file.FLOATS[dtype].dtype
            rounded = exact.astype(kind).astype(np.float32)
            found = gguf_file.to_float32(out.tensors[name])
            # One unit in the last place where the two orders of summing straddle a rounding boundary.
            assert (found != rounded).mean() < 1e-3
            np.testing.assert_allclose(found, rounded, rtol=2**-7 if dtype == "bf16" else 2**-10)


def test_quantised_model_loads_and_mostly_agrees(base: Path, tmp_path: Path) -> None:
    original = tiny.save_adapter(tmp_path / "original", base)
    gguf_base.build(base, tmp_path / "base.gguf")
    described = architectures.describe(base)
    gguf_merge.merge(tmp_path / "base.gguf", peft.read(original), tmp_path / "f16.gguf", "f16", described)
    made = gguf_quantize.quantize(tmp_path / "f16.gguf", tmp_path / "q8_0.gguf", "q8_0")
    assert made.types["Q8_0"] >= 7 * 3 and made.types.keys() == {"Q8_0", "F32"} and not made.fallbacks
    found = llama.logits(llama.load(tmp_path / "q8_0.gguf", context=64), tiny.PROMPT)
    agree = found.argmax(-1) == tiny.torch_logits(base, original).argmax(-1)
    assert agree.mean() >= 0.75
    made = gguf_quantize.quantize(tmp_path / "f16.gguf", tmp_path / "q4.gguf", "q4_k_m")
    assert made.fallbacks["blk.0.attn_q.weight"] == "Q5_0", "rows of 64 do not divide into blocks of 256"
    llama.logits(llama.load(tmp_path / "q4.gguf", context=64), tiny.PROMPT)


def test_stories260k_in_llama_cpp_with_an_adapter(stories: Path, tmp_path: Path) -> None:
    original = tiny.save_adapter(tmp_path / "original", stories, lora_alpha=32)
    expected = tiny.torch_logits(stories, original)
    described = architectures.describe(stories)
    gguf_base.build(stories, tmp_path / "base.gguf")
    gguf_adapter.write(peft.read(original), tmp_path / "adapter.gguf", described)
    model = llama.load(tmp_path / "base.gguf", adapter=tmp_path / "adapter.gguf")
    difference = np.abs(llama.logits(model, tiny.PROMPT) - expected).max()
    assert difference < BOUND
