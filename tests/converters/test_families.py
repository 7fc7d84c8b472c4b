"""Every family: its linear layers, and a GGUF of it that llama.cpp runs and tokenises as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import architectures, llama, peft
from converters.families import FAMILIES
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import hyperparameters
from converters.gguf import merge as gguf_merge
from oneround.errors import BadModel
from tests.converters import tiny, tiny_families


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: tiny_families.save(root / kind, kind) for kind in tiny_families.KINDS}


@pytest.fixture(params=tiny_families.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_family_has_hyperparameters_and_a_tiny_model() -> None:
    assert {family.arch for family in FAMILIES.values()} == hyperparameters.WRITERS.keys()
    tiny_ones = {tiny_families.model_class(kind) for kind in tiny_families.KINDS}
    assert tiny_ones == FAMILIES.keys()


def test_linears_are_those_of_the_torch_model(folders: dict[str, Path], kind: str) -> None:
    described, model = architectures.describe(folders[kind]), AutoModelForCausalLM.from_pretrained(folders[kind])
    theirs = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert described.linears == theirs
    names = architectures.checkpoint_names(described)
    assert {architectures.gguf_name(described, f"{module}.weight"): module for module in theirs} == names


def test_logits_and_tokens(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    gguf_base.build(folders[kind], tmp_path / "base.gguf")
    model = llama.load(tmp_path / "base.gguf", context=256)
    found = llama.logits(model, tiny_families.PROMPT)
    assert np.abs(found - tiny_families.torch_logits(folders[kind])).max() < tiny_families.bound(kind)
    theirs = AutoTokenizer.from_pretrained(folders[kind])
    for text in tiny_families.texts(kind):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == theirs(text)["input_ids"], text


def test_config_of_an_earlier_transformers(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    copy = tmp_path / folders[kind].name  # the folder's name is the model's
    shutil.copytree(folders[kind], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(tiny_families.as_on_the_hub(config)))
    gguf_base.build(folders[kind], tmp_path / "now.gguf")
    gguf_base.build(copy, tmp_path / "then.gguf")
    assert (tmp_path / "now.gguf").read_bytes() == (tmp_path / "then.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["llama-2", "mistral", "gemma2", "gemma3", "phi-3"])
@pytest.mark.parametrize("without", ["tokenizer.model", "added_tokens_decoder"])
def test_tokens_of_other_files(folders: dict[str, Path], tmp_path: Path, kind: str, without: str) -> None:
    folder = tiny_families.without(folders[kind], tmp_path / "base", without)
    gguf_base.build(folder, tmp_path / "base.gguf")
    model, theirs = llama.load(tmp_path / "base.gguf", context=64), AutoTokenizer.from_pretrained(folder)
    for text in tiny_families.texts(kind):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("kind", ["llama-2", "qwen2-tied", "qwen3", "gemma2", "gemma3", "phi-3", "phi-4-mini"])
def test_adapters(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Of all linear layers, merged and beside the base."""
    folder, described = folders[kind], architectures.describe(folders[kind])
    original = tiny.save_adapter(tmp_path / "peft", folder)
    expected, adapter = tiny_families.torch_logits(folder, original), peft.read(original)
    assert adapter.modules.keys() == described.linears.keys()
    gguf_base.build(folder, tmp_path / "base.gguf")
    gguf_merge.merge(tmp_path / "base.gguf", adapter, tmp_path / "merged.gguf", "f32", described)
    gguf_adapter.write(adapter, tmp_path / "adapter.gguf", described)
    merged = llama.load(tmp_path / "merged.gguf", context=256)
    beside = llama.load(tmp_path / "base.gguf", adapter=tmp_path / "adapter.gguf", context=256)
    for model in (merged, beside):
        assert np.abs(llama.logits(model, tiny_families.PROMPT) - expected).max() < tiny_families.bound(kind)


def test_longrope_has_short_factors_for_a_short_context(tmp_path: Path) -> None:
    """llama.cpp goes by the room for tokens, a multiple of 256, where transformers goes by the tokens."""
    sizes = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    folder = tiny_families.save(tmp_path / "base", "phi-4-mini", **sizes)
    gguf_base.build(folder, tmp_path / "base.gguf")
    expected = tiny_families.torch_logits(folder)
    short, long = (llama.load(tmp_path / "base.gguf", context=context) for context in (256, 512))
    assert np.abs(llama.logits(short, tiny_families.PROMPT) - expected).max() < tiny_families.bound("phi-4-mini")
    assert np.abs(llama.logits(long, tiny_families.PROMPT) - expected).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("qwen2", {"head_dim": 24}, "do not make up hidden_size"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "every second layer"),
        ("gemma2", {"tie_word_embeddings": False}, "output layer is not the embedding"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is absent"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation gelu"),
        (
            "gemma3",
            {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"]},
            "after 5 sliding",
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("phi-4-mini", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, more: dict[str, object], said: str
) -> None:
    folder = tiny_families.with_config(folders[kind], tmp_path / "base", more)
    if "attention_bias" in more:
        folder = tiny_families.save(tmp_path / "biased", kind, **more)
    with pytest.raises(BadModel, match=said):
        gguf_base.build(folder, tmp_path / "base.gguf")
    assert not (tmp_path / "base.gguf").exists()


def test_gemma3_without_a_window(tmp_path: Path) -> None:
    folder = tiny_families.save(tmp_path / "base", "gemma3", layer_types=["full_attention"] * 7)
    gguf_base.build(folder, tmp_path / "base.gguf")
    found = llama.logits(llama.load(tmp_path / "base.gguf", context=64), tiny_families.PROMPT)
    assert np.abs(found - tiny_families.torch_logits(folder)).max() < tiny_families.bound("gemma3")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3", "phi-3", "phi-4-mini", "mistral"])
def test_what_config_json_leaves_out_is_transformers_default(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Hub files of earlier versions hold little; what is filled in is what transformers fills in."""
    config = tiny_families.config(kind)
    bare = type(config)(**{key: getattr(config, key) for key in ("vocab_size", "architectures")})
    ours, family = tiny_families.model_class(kind), FAMILIES[tiny_families.model_class(kind)]
    assert ours in FAMILIES
    for key, value in family.defaults.items():
        assert getattr(bare, key) == value, key
