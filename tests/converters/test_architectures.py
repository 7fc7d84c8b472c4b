from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from converters import architectures
from converters.architectures import adapted, describe, model_files
from oneround.errors import BadData, BadModel, LayoutMismatch


def test_linears_are_those_of_the_torch_model(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert describe(base).linears == theirs


def test_target_modules(base: Path) -> None:
    described = describe(base)
    assert adapted(described, ["all-linear"]) == described.linears
    assert adapted(described, "all-linear") == described.linears
    assert set(adapted(described, ["q_proj", "layers.1.mlp.up_proj"])) == {
        *(f"model.layers.{n}.self_attn.q_proj" for n in range(3)),
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["query"], "there are down_proj, gate_proj"),
        (["proj"], "there are"),
        (["q_proj", "lm_head"], "lm_head cannot be adapted"),
        (["model.embed_tokens"], "embed_tokens cannot be adapted"),
        ([], "names no layer"),
    ],
)
def test_target_modules_that_are_refused(base: Path, targets: list[str], said: str) -> None:
    with pytest.raises(LayoutMismatch, match=said):
        adapted(describe(base), targets)


def test_names_and_rows(base: Path) -> None:
    described = describe(base)
    assert architectures.gguf_name(described, "model.layers.2.self_attn.k_proj.weight") == "blk.2.attn_k.weight"
    rows = np.arange(48, dtype=np.float32)[:, None]  # two key-value heads of 24
    moved = architectures.interleave(described, "model.layers.0.self_attn.k_proj", rows)[:, 0]
    assert moved[:4].tolist() == [0, 12, 1, 13] and moved[24:28].tolist() == [24, 36, 25, 37]
    assert architectures.interleave(described, "model.layers.0.self_attn.v_proj", rows) is rows


def test_model_files_are_what_training_needs_and_no_more(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["untied"], folder)
    for name in ("modeling.py", "pytorch_model.bin", "other.safetensors", "README.md", "merges.txt"):
        (folder / name).write_text("x")
    names = [file.name for file in model_files(folder)]
    assert names == sorted(names)
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 2
    assert set(names) - shards == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("architectures", ["MambaForCausalLM"], "MambaForCausalLM is not supported"),
        ("architectures", 3, "expected a list"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_hidden_layers", 4, "no weight file holds"),
        ("num_attention_heads", True, "num_attention_heads"),
        ("num_key_value_heads", 3, "do not go together"),
        ("head_dim", 23, "do not go together"),
        ("hidden_size", "64", "hidden_size"),
        ("hidden_size", None, "hidden_size is absent"),
        ("intermediate_size", 161, "config.json makes it"),
        ("vocab_size", -1, "vocab_size"),
        ("hidden_act", "gelu", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}, "quantised"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
    ],
)
def test_bad_configs_are_named(bases: dict[str, Path], tmp_path: Path, key: str, value: Any, said: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["tied"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(BadModel, match=said):
        describe(folder)


def test_unknown_family_names_both_ways_out(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(BadModel) as raised:
        describe(tmp_path)
    assert "model.gguf" in raised.value.hint and "convert_hf_to_gguf.py" in raised.value.hint


@pytest.mark.parametrize("index", [{"a": "../secret.safetensors"}, {"a": 3}, {"a": "gone.safetensors"}, {}])
def test_bad_index(bases: dict[str, Path], tmp_path: Path, index: dict[str, Any]) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["untied"], folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(BadModel):
        describe(folder)


def test_missing_parts(tmp_path: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(BadModel, match="not a folder"):
        describe(tmp_path / "gone")
    with pytest.raises(BadModel, match=r"config.json is not there"):
        describe(tmp_path)
    shutil.copyfile(bases["tied"] / "config.json", tmp_path / "config.json")
    with pytest.raises(BadModel, match="no weights"):
        describe(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadData):
        describe(tmp_path)
