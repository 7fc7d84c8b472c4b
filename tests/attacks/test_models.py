"""Junk in a model's files, of every family: errors of ours, never a traceback, whatever the values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import architectures, tensors
from converters.families import FAMILIES
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import sentencepiece
from oneround.errors import BadData, BadModel
from tests.attacks.damage import JUNK, mutations, survives
from tests.converters import tiny_families

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 2**31, 2**64, 10**400, 0.0, -0.0, 1e-300, 1e39, 1e308, float("nan"), "1", True]
)
ROPE = [
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "partial_rotary_factor",
    "attention_factor",
    "original_max_position_embeddings",
    "mscale",
    "truncate",
    "beta_fast",
    "beta_slow",
    "extrapolation_factor",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "full_attention",
    "sliding_attention",
]
TYPES = st.sampled_from(["default", "linear", "llama3", "yarn", "longrope", "su", "dynamic", "proportional", ""])
MORE = [
    "architectures",
    "head_dim",
    "num_key_value_heads",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "rope_local_base_freq",
    "sliding_window",
    "sliding_window_pattern",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "hidden_activation",
    "hidden_act",
    "tie_word_embeddings",
    "quantization_config",
    "rms_norm_eps",
    "max_position_embeddings",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("hostile")
    return [tiny_families.save(root / kind, kind, max_shard_size="1GB") for kind in tiny_families.KINDS]


def junk_in(values: dict[str, Any], data: st.DataObject, keys: list[str]) -> None:
    """Put something under one of the keys, or within what is there."""
    key = data.draw(st.sampled_from(keys))
    inner = values.get(key)
    if key in ("rope_parameters", "rope_scaling") and data.draw(st.booleans()):
        rope = dict(inner) if isinstance(inner, dict) else {}
        rope["rope_type"] = data.draw(TYPES)
        rope[data.draw(st.sampled_from(ROPE))] = data.draw(JUNK | NUMBERS)
        values[key] = rope
    elif isinstance(inner, dict) and inner and data.draw(st.booleans()):
        junk_in(inner, data, sorted(inner))
    else:
        values[key] = data.draw(JUNK | NUMBERS)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_junk_in_settings_is_never_a_traceback(folders: list[Path], data: st.DataObject) -> None:
    folder = data.draw(st.sampled_from(folders))
    name = data.draw(st.sampled_from(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json"]))
    values = json.loads((folder / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        junk_in(values, data, sorted({*values, *MORE}) if name == "config.json" else sorted(values))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for file in folder.iterdir():
            (copy / file.name).symlink_to(file)
        (copy / name).unlink()
        (copy / name).write_text(json.dumps(values))
        survives(lambda: gguf_base.build(copy, copy / "x.gguf"))
        assert not list(copy.glob("*.partial")), "nothing half-written is left"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_junk_in_another_familys_config(folders: list[Path], data: st.DataObject) -> None:
    """Described by a GGUF, which is sound."""
    folder = data.draw(st.sampled_from(folders))
    base = folder.with_suffix(".gguf")
    if not base.exists():
        gguf_base.build(folder, base)
    values = json.loads((folder / "config.json").read_text())
    junk_in(values, data, sorted({*values, *MORE}))
    values["architectures"] = ["HelixForCausalLM"]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
        (copy / "config.json").write_text(json.dumps(values))
        survives(lambda: architectures.describe(copy, base))


def test_mutated_gguf_of_another_family(folders: list[Path], tmp_path: Path) -> None:
    folder = folders[0]
    copy = tiny_families.with_config(folder, tmp_path / "base", {"architectures": ["HelixForCausalLM"]})
    path = tmp_path / "x.gguf"
    gguf_base.build(folder, path)
    raw = path.read_bytes()
    header = len(raw) - sum(tensor.info.nbytes for tensor in gguf_file.read(path).tensors.values())
    for changed in mutations(raw, header, 150):
        path.write_bytes(changed)
        survives(lambda: architectures.describe(copy, path))


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.0.self_attn.o_proj.bias", "model.extra.weight"])
def test_tensors_that_have_no_place(folders: list[Path], tmp_path: Path, name: str) -> None:
    for folder in folders:
        if architectures.describe(folder).arch == "llama":
            continue
        copy = tiny_families.with_config(folder, tmp_path / folder.name, {})
        weights = {key: np.array(tensor) for key, tensor in architectures.weights(folder).items()}
        tensors.write(copy / "model.safetensors", {**weights, name: np.zeros(64, np.float32)}, {})
        with pytest.raises(BadModel, match="no place"):
            gguf_base.build(copy, tmp_path / "x.gguf")


def test_two_tokens_of_one_text(folders: list[Path], tmp_path: Path) -> None:
    """llama.cpp would abort the process."""
    for folder in folders:
        copy = tiny_families.with_config(folder, tmp_path / folder.name, {})
        (copy / "tokenizer.model").unlink(missing_ok=True)
        source = json.loads((copy / "tokenizer.json").read_text())
        first = source["added_tokens"][0]
        source["added_tokens"].append({**first, "id": tiny_families.VOCAB - 1})
        (copy / "tokenizer.json").write_text(json.dumps(source))
        with pytest.raises(BadModel, match="have the text"):
            gguf_base.build(copy, tmp_path / "x.gguf")


def test_sentencepiece_models(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for raw in (b"\xff" * 20, b"\x1a\xff\xff\xff\x0f", b"\x1a\x02\x18", b"\x0b"):
        path.write_bytes(raw)
        with pytest.raises(BadModel):
            sentencepiece.prepends_space(path)
    path.write_bytes(tiny_families.sentencepiece_model([("<unk>", 0.0, 2)], prefix=False))
    assert not sentencepiece.prepends_space(path)
    path.write_bytes(b"")
    assert sentencepiece.prepends_space(path)


def test_every_familys_defaults_can_be_read(folders: list[Path]) -> None:
    for name, family in FAMILIES.items():
        assert family.defaults["max_position_embeddings"] > 1, name
    with pytest.raises(BadData):
        architectures.describe(folders[0] / "tokenizer.json")
