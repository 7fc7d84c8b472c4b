"""What the common layout cannot hold is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import adapter, architectures, mlx, patterns, peft
from converters.adapter import Adapter, LowRank
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import merge as gguf_merge
from converters.gguf import quantize as gguf_quantize
from converters.settings import Settings
from oneround.errors import BadAdapter, BadModel, LayoutMismatch, UsageError
from tests.converters import tiny

NAME = "model.layers.0.self_attn.q_proj"


def save_peft(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    found = {
        f"base_model.model.{NAME}.lora_A.weight": np.ones((2, 64), np.float32),
        f"base_model.model.{NAME}.lora_B.weight": np.ones((96, 2), np.float32),
    }
    folder.mkdir()
    save_file({**found, **(tensors or {})}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"from_the_future": 1}, "from_the_future"),
        ({"r": 3}, "rank 3"),
        ({"r": 0}, "r is 0"),
        ({"r": 1e9}, "r is 1000000000.0"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"rank_pattern": {"q_proj": "2"}}, "q_proj"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_peft_settings(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(BadAdapter, match=said.replace("(", r"\(")):
        peft.read(save_peft(tmp_path / "adapter", config))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (f"base_model.model.{NAME}.lora_magnitude_vector", (96,), "DoRA"),
        (f"base_model.model.{NAME}.lora_B.bias", (96,), "a bias on lora_B"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (2, 384), "embedding"),
        ("base_model.model.model.embed_tokens.base_layer.weight", (384, 64), "a weight of the base"),
        ("base_model.model.lm_head.weight", (384, 64), "lm_head"),
        ("base_model.model.x.lora_A.weight", (2, 64), "only one of its two"),
        ("x.lora_A.weight", (2, 64), "x.lora_A"),
    ],
)
def test_peft_tensors(tmp_path: Path, name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(BadAdapter, match=said):
        peft.read(save_peft(tmp_path / "adapter", {}, {name: np.ones(shape, np.float32)}))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "adapter", {})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadAdapter, match="a pickle, which can run code") as raised:
        peft.read(folder)
    assert "safe_serialization" in raised.value.hint


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"a": "../secret.safetensors"}, "not the name of a safetensors file"),
        ({"a": "gone.safetensors"}, "1 of 1 weight files are missing"),
        ({}, "0 of 0"),
        ([], "expected an object"),
    ],
)
def test_sharded_peft(tmp_path: Path, index: Any, said: str) -> None:
    folder = save_peft(tmp_path / "adapter", {})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(BadAdapter, match=said):
        peft.read(folder)


def test_output_layer_lora(tmp_path: Path) -> None:
    extra = {
        "base_model.model.lm_head.lora_A.weight": np.ones((2, 64), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((384, 2), np.float32),
    }
    with pytest.raises(BadAdapter, match="lm_head"):
        peft.read(save_peft(tmp_path / "adapter", {}, extra))


def test_rank_pattern_matches_as_peft_matches(tmp_path: Path) -> None:
    """From the right at a dot, first key first: `q_proj` does, `proj` does not; an anchored key does."""
    config = {"r": 9, "rank_pattern": {"proj": 5, "^model.layers.0.*q_proj": 2}, "alpha_pattern": {"q_proj": 6}}
    (found,) = peft.read(save_peft(tmp_path / "adapter", config)).modules.values()
    assert found.b[0, 0] == 3.0


def test_expressions_without_end() -> None:
    """Python's `re` would be at this for longer than the sun burns."""
    endless = Settings({r"([a-z_.0-9]+)*X": 3}, "rank_pattern", BadAdapter)
    with pytest.raises(BadAdapter, match=r"rank_pattern: its regular expressions take more than 0.5 s"):
        patterns.first_keys(endless, [NAME], seconds=0.5)


def test_patterns_match_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    names = [f"model.layers.{n}.{inner}" for n in range(12) for inner in ("self_attn.q_proj", "mlp.up_proj", "x_proj")]
    plain = ["layers.1.x_proj", "^model.layers.2.mlp.up_proj", r"3\.self_attn\.q_proj", "q_proj", "proj", "1.x_proj"]
    for keys in (plain, [r"layers\.[12]\..*", *plain], [*plain, "", ".*_proj"], [r"(x|up)_proj$", "mlp.*"], ["."], []):
        found = patterns.first_keys(Settings(dict.fromkeys(keys, 1), "x", BadAdapter), names)
        assert found == {name: key for name in names if (key := get_pattern_key(keys, name)) != name}


def test_many_patterns_are_quick(tmp_path: Path) -> None:
    """Mixed ranks name a pattern for half of the modules; `re` alone keeps 512 compiled, and took 40 s for these."""
    shape, modules = (8, 4), {}
    for n in range(1200):
        rank = 2 + n % 2
        a, b = np.ones((rank, shape[1]), np.float32), np.ones((shape[0], rank), np.float32)
        modules[f"model.layers.{n // 10}.mlp.p{n % 10}"] = LowRank(a, b)
    peft.write(Adapter(modules), tmp_path / "adapter", base_model="x")
    start = time.process_time()
    assert peft.read(tmp_path / "adapter").ranks == Adapter(modules).ranks
    assert time.process_time() - start < 10


def save_mlx(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    found = {f"{NAME}.lora_a": np.ones((64, 2), np.float32), f"{NAME}.lora_b": np.ones((2, 96), np.float32)}
    folder.mkdir()
    save_file({**found, **(tensors or {})}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "extra", "said"),
    [
        ({"fine_tune_type": "dora"}, {}, "dora"),
        ({"fine_tune_type": "full"}, {}, "full"),
        ({"peft_type": "LORA"}, {}, "the settings of a PEFT adapter"),
        ({"lora_parameters": {"scale": "20"}}, {}, "scale"),
        ({"lora_parameters": []}, {}, "lora_parameters"),
        ({}, {f"{NAME}.m": (96,)}, r"q_proj\.m"),
        ({}, {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": (4, 2, 64)}, r"experts.0.up_proj has only one"),
        ({}, {"model.layers.0.attn.embed_q.lora_a": (4, 2, 64)}, "embed_q.*neither linear nor a switch layer"),
        ({}, {f"{NAME}.weight": (96, 64)}, "a weight of the base"),
        ({"lora_parameters": {"rank": 3}}, {}, "rank 3 by the settings"),
        ({}, {"model.embed_tokens.lora_a": (384, 2), "model.embed_tokens.lora_b": (2, 64)}, "embed_tokens"),
    ],
)
def test_mlx(tmp_path: Path, config: dict[str, Any], extra: dict[str, tuple[int, ...]], said: str) -> None:
    tensors = {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    with pytest.raises(BadAdapter, match=said):
        mlx.read(save_mlx(tmp_path / "adapter", config, tensors))


def test_mlx_scale_is_twenty_when_nothing_is_said(tmp_path: Path) -> None:
    assert mlx.read(save_mlx(tmp_path / "adapter", {})).modules[NAME].b[0, 0] == 20.0


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"general.type": "model"}, {}, "general.type"),
        ({"general.architecture": "qwen2"}, {}, "general.architecture"),
        ({"adapter.type": "control_vector"}, {}, "adapter.type"),
        ({"adapter.lora.alpha": float("nan")}, {}, "adapter.lora.alpha"),
        ({"adapter.alora.invocation_tokens": 1.0}, {}, "adapter.alora.invocation_tokens"),
        ({}, {"token_embd.weight.lora_a": (2, 384)}, "embedding or output layer"),
        ({}, {"output.weight.lora_b": (384, 2)}, "embedding or output layer"),
        ({}, {"blk.0.attn_q.weight": (96, 64)}, r"blk.0.attn_q.weight is no factor"),
        (
            {},
            {"blk.99.attn_q.weight.lora_a": (2, 64), "blk.99.attn_q.weight.lora_b": (96, 2)},
            r"blk.99.attn_q.weight.lora_a is no factor",
        ),
        ({}, {"blk.1.attn_q.weight.lora_a": (2, 64)}, "only one of its two"),
        ({}, {"blk.1.attn_q.weight.lora_a": (2, 64), "blk.1.attn_q.weight.lora_b": (96, 3)}, "do not share a rank"),
        ({}, {"blk.1.attn_q.weight.lora_a": (2, 65), "blk.1.attn_q.weight.lora_b": (96, 2)}, "q_proj is"),
        ({}, {"blk.1.attn_q.weight.lora_a": (2, 3, 64), "blk.1.attn_q.weight.lora_b": (2, 96, 3)}, "not a matrix"),
    ],
)
def test_gguf(base: Path, tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], said: str) -> None:
    described = architectures.describe(base)
    known = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", **keys}
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", known.pop("general.architecture"))
    for key, value in known.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, shape in {
        "blk.0.attn_q.weight.lora_a": (2, 64),
        "blk.0.attn_q.weight.lora_b": (96, 2),
        **tensors,
    }.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(BadAdapter, match=said):
        gguf_adapter.read(tmp_path / "adapter.gguf", described)


def test_gguf_adapters_of_whole_numbers(base: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 64), np.int32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(BadAdapter, match=r"lora_a is I32, not floats"):
        gguf_adapter.read(tmp_path / "adapter.gguf", architectures.describe(base))


def test_adapters_that_do_not_fit_the_base(base: Path, tmp_path: Path) -> None:
    described = architectures.describe(base)
    gguf_base.build(base, tmp_path / "base.gguf")
    for name, shape in (("model.layers.9.self_attn.q_proj", (96, 64)), (NAME, (64, 96)), ("lm_head", (384, 64))):
        a, b = np.ones((2, shape[1]), np.float32), np.ones((shape[0], 2), np.float32)
        wrong = Adapter({name: LowRank(a, b)})
        with pytest.raises(LayoutMismatch, match=name):
            mlx.write(wrong, tmp_path / "mlx", described)
        with pytest.raises(LayoutMismatch, match=name):
            gguf_adapter.write(wrong, tmp_path / "adapter.gguf", described)
        with pytest.raises(LayoutMismatch, match=name):
            gguf_merge.merge(tmp_path / "base.gguf", wrong, tmp_path / "merged.gguf", "f16", described)
    assert [file.name for file in tmp_path.iterdir()] == ["base.gguf"]


def test_merging_into_another_model_or_a_quantised_one(base: Path, tmp_path: Path) -> None:
    described = architectures.describe(base)
    update = adapter.initial(described.linears, 2, 0)
    other = tiny.save_model(tmp_path / "other", tiny.config(tied=True, num_key_value_heads=4))
    tiny.save_tokenizer(other)
    gguf_base.build(other, tmp_path / "other.gguf")
    with pytest.raises(LayoutMismatch, match="head_count_kv"):
        gguf_merge.merge(tmp_path / "other.gguf", update, tmp_path / "merged.gguf", "f16", described)
    gguf_base.build(base, tmp_path / "f16.gguf", "f16")
    gguf_quantize.quantize(tmp_path / "f16.gguf", tmp_path / "q4_k_m.gguf", "q4_k_m")
    with pytest.raises(BadModel, match="is quantised"):
        gguf_merge.merge(tmp_path / "q4_k_m.gguf", update, tmp_path / "merged.gguf", "f16", described)


def test_quantising_what_cannot_be_leaves_nothing(base: Path, tmp_path: Path) -> None:
    gguf_adapter.write(
        adapter.initial(architectures.describe(base).linears, 2, 0),
        tmp_path / "adapter.gguf",
        architectures.describe(base),
    )
    with pytest.raises(BadModel, match="does not quantise"):
        gguf_quantize.quantize(tmp_path / "adapter.gguf", tmp_path / "out.gguf", "q8_0")
    with pytest.raises(UsageError, match="q3"):
        gguf_quantize.quantize(tmp_path / "adapter.gguf", tmp_path / "out.gguf", "q3")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.gguf"]
