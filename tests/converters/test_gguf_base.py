"""A base GGUF built from a folder: tokens, logits and keys. Equality with llama.cpp's own converter, key by key and
tensor by tensor, is in test_oracle; the families are in test_families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer

from converters import llama
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from oneround.errors import BadModel
from tests.converters import tiny


def test_logits_are_those_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    gguf_base.build(base, tmp_path / "base.gguf")
    found = llama.logits(llama.load(tmp_path / "base.gguf", context=64), tiny.PROMPT)
    assert np.abs(found - tiny.torch_logits(base)).max() < 1e-4  # measured: 5e-6


def test_llama3_rope_reaches_past_the_original_context(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = tiny.save_model(tmp_path / "base", tiny.config(tied=True, rope_parameters=rope))
    tiny.save_tokenizer(folder)
    gguf_base.build(folder, tmp_path / "base.gguf")
    factors = gguf_file.to_float32(gguf_file.read(tmp_path / "base.gguf").tensors["rope_freqs.weight"])
    assert factors.min() == 1.0 and factors.max() == 8.0 and len(np.unique(factors)) > 3
    found = llama.logits(llama.load(tmp_path / "base.gguf", context=64), tiny.PROMPT)
    assert np.abs(found - tiny.torch_logits(folder)).max() < 1e-4


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pre", tiny.PRE_TOKENIZERS)
def test_llama_cpp_tokenises_as_transformers_does(bases: dict[str, Path], tmp_path: Path, pre: str, bos: bool) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["tied"], folder)
    tiny.save_tokenizer(folder, pre, bos)
    gguf_base.build(folder, tmp_path / "base.gguf")
    file = gguf_file.read(tmp_path / "base.gguf")
    assert file.value("tokenizer.ggml.pre") == pre
    assert file.value("tokenizer.ggml.add_bos_token") == bos
    assert file.value("tokenizer.chat_template")
    model, theirs = llama.load(tmp_path / "base.gguf", context=64), AutoTokenizer.from_pretrained(folder)
    for text in tiny.TEXTS:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("without", [None, "tokenizer.model"])
def test_sentencepiece_style_tokens(stories: Path, tmp_path: Path, without: str | None) -> None:
    """From tokenizer.model, and from tokenizer.json alone, where the scores are the merges' ranks."""
    folder = tmp_path / "stories"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(without or " "))
    folder.chmod(0o755)
    gguf_base.build(folder, tmp_path / "base.gguf")
    model, theirs = llama.load(tmp_path / "base.gguf"), AutoTokenizer.from_pretrained(folder)
    for text in ("Once upon a time, there was a little girl.", 'He said: "Yes!"', "zażółć 12"):
        assert model.tokenize(text.encode(), add_bos=True) == theirs(text)["input_ids"], text


def test_gguf_package_reads_what_is_written(base: Path, tmp_path: Path) -> None:
    gguf_base.build(base, tmp_path / "base.gguf", "bf16")
    theirs, ours = gguf.GGUFReader(tmp_path / "base.gguf"), gguf_file.read(tmp_path / "base.gguf")
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        assert tuple(reversed(tensor.shape.tolist())) == ours.tensors[tensor.name].info.shape
        assert tensor.data.tobytes() == ours.tensors[tensor.name].data.tobytes()
    for key in ("general.architecture", "llama.block_count", "llama.rope.freq_base", "tokenizer.ggml.add_bos_token"):
        assert theirs.fields[key].contents() == ours.value(key)


def test_unknown_pre_tokenizer_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["tied"], folder)
    source = json.loads((folder / "tokenizer.json").read_text())
    source["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(BadModel, match="pre-tokenizer") as raised:
        gguf_base.build(folder, tmp_path / "base.gguf")
    assert "convert_hf_to_gguf.py" in raised.value.hint
    assert list(tmp_path.iterdir()) == [folder]  # nothing half written
