"""LoRA on single experts: a Mixtral's, in transformers (merged), MLX and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from transformers import MixtralConfig

from converters import adapter, architectures, experts, llama, mlx, peft, tensors
from converters.adapter import Adapter, LowRank
from converters.architectures import Base
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import write as gguf_write
from converters.gguf.file import Info
from oneround.errors import LayoutMismatch
from tests.converters import tiny
from tests.converters.cli import call

EXPERTS, INNER, BLOCKS = 4, 96, 3
STACKED = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
BOUND = 1e-4  # of logits; measured: at most 7e-6


class Moe(NamedTuple):
    """A Mixtral as a folder and as a GGUF."""

    folder: Path
    gguf: Path
    weights: dict[str, NDArray[np.float32]]

    @property
    def base(self) -> Base:
        return architectures.describe(self.folder, self.gguf)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Moe:
    """A tiny Llama whose feed-forward layers are replaced by experts, in its checkpoint and in its GGUF."""
    root = tmp_path_factory.mktemp("moe")
    settings = tiny.config(tied=False, attention_bias=False, head_dim=16)
    plain = tiny.save_model(root / "llama", settings)
    tiny.save_tokenizer(plain)
    gguf_base.build(plain, root / "llama.gguf")

    weights = {name: np.array(tensor) for name, tensor in tensors.read(plain / "model.safetensors")[0].items()}
    weights = {name: tensor for name, tensor in weights.items() if ".mlp." not in name}
    source, rng = gguf_file.read(root / "llama.gguf"), np.random.default_rng(0)
    infos = [stored.info for name, stored in source.tensors.items() if ".ffn_" not in name or "norm" in name]
    data: list[Any] = [source.tensors[info.name].data for info in infos]
    for n in range(BLOCKS):
        layer = f"model.layers.{n}.block_sparse_moe"
        weights[f"{layer}.gate.weight"] = rng.normal(size=(EXPERTS, 64)).astype(np.float32) / 4
        infos.append(Info(f"blk.{n}.ffn_gate_inp.weight", (EXPERTS, 64), GGMLQuantizationType.F32))
        data.append(weights[f"{layer}.gate.weight"])
        for projection, stacked in STACKED.items():
            shape = (64, INNER) if projection == "w2" else (INNER, 64)
            values = rng.normal(size=(EXPERTS, *shape)).astype(np.float32) / 8
            weights |= {f"{layer}.experts.{e}.{projection}.weight": values[e] for e in range(EXPERTS)}
            infos.append(Info(f"blk.{n}.{stacked}.weight", (EXPERTS, *shape), GGMLQuantizationType.F32))
            data.append(values)
    keys = dict(source.keys)
    for key, value in (("expert_count", EXPERTS), ("expert_used_count", 2), ("feed_forward_length", INNER)):
        keys[f"llama.{key}"] = gguf_write.encode(value, gguf.GGUFValueType.UINT32)
    gguf_write.write(root / "moe.gguf", keys, infos, data)
    return Moe(save(root / "moe", weights), root / "moe.gguf", weights)


def save(folder: Path, weights: dict[str, NDArray[np.float32]]) -> Path:
    folder.mkdir()
    tiny.save_tokenizer(folder)
    given = tiny.config(tied=False, attention_bias=False, head_dim=16).to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps")  # fmt: skip
    config = MixtralConfig(
        **{name: given[name] for name in names},
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())  # mlx-lm knows the older key alone
    (folder / "config.json").write_text(json.dumps({**values, "rope_theta": 10000.0}))
    tensors.write(folder / "model.safetensors", weights, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def update(moe: Moe) -> Adapter:
    """Of attention and of some experts, in ranks that differ."""
    rng, made = np.random.default_rng(1), {}
    for name, weight in moe.weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and "layers." in name and ".gate." not in name and rng.random() < 0.7:
            rank = int(rng.integers(1, 5))
            a, b = rng.normal(size=(rank, weight.shape[1])), rng.normal(size=(weight.shape[0], rank))
            made[module] = LowRank(a.astype(np.float32) / 8, b.astype(np.float32) / 8)
    assert len(made) > 20 and len({update.rank for update in made.values()}) == 4
    return Adapter(made)


def test_experts_in_mlx_and_llama_cpp_are_those_of_the_merged_checkpoint(
    moe: Moe, update: Adapter, tmp_path: Path
) -> None:
    merged = dict(moe.weights)
    for name, factors in update.modules.items():
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + factors.delta()
    expected = tiny.torch_logits(save(tmp_path / "merged", merged))
    plain = tiny.torch_logits(moe.folder)
    assert np.abs(expected - plain).max() > 0.5  # the adapter does something
    assert np.abs(llama.logits(llama.load(moe.gguf, context=64), tiny.PROMPT) - plain).max() < BOUND

    adapter.write(update, tmp_path / "common.safetensors")
    ours = adapter.read(tmp_path / "common.safetensors")
    mlx.write(ours, tmp_path / "mlx", moe.base)
    gguf_adapter.write(ours, tmp_path / "adapter.gguf", moe.base)
    found = {
        "mlx": tiny.mlx_logits(moe.folder, tmp_path / "mlx"),
        "gguf": llama.logits(llama.load(moe.gguf, adapter=tmp_path / "adapter.gguf", context=64), tiny.PROMPT),
    }
    differences = {name: float(np.abs(logits - expected).max()) for name, logits in found.items()}
    assert max(differences.values()) < BOUND, differences


def test_experts_come_back(moe: Moe, update: Adapter, tmp_path: Path) -> None:
    """Experts that were left out come back with ΔW = 0, since a layer's are one tensor."""
    gguf_adapter.write(update, tmp_path / "adapter.gguf", moe.base)
    mlx.write(gguf_adapter.read(tmp_path / "adapter.gguf", moe.base), tmp_path / "mlx", moe.base)
    for again in (gguf_adapter.read(tmp_path / "adapter.gguf", moe.base), mlx.read(tmp_path / "mlx")):
        assert again.modules.keys() >= update.modules.keys()
        for name, factors in again.modules.items():
            expected = update.modules[name].delta() if name in update.modules else np.zeros(factors.shape, np.float32)
            np.testing.assert_allclose(factors.delta(), expected, rtol=0, atol=1e-6)


def test_experts_by_command(moe: Moe, update: Adapter, tmp_path: Path) -> None:
    adapter.write(update, tmp_path / "common.safetensors")
    base = ("--base", moe.folder, "--base-gguf", moe.gguf)
    call(tmp_path / "common.safetensors", tmp_path / "mlx", "--to", "mlx", *base)
    call(tmp_path / "mlx", tmp_path / "adapter.gguf", "--to", "gguf", *base)
    call(tmp_path / "adapter.gguf", tmp_path / "again.safetensors", "--to", "canonical", *base)
    again = adapter.read(tmp_path / "again.safetensors")
    for name, factors in update.modules.items():
        np.testing.assert_allclose(again.modules[name].delta(), factors.delta(), rtol=0, atol=1e-6)
    shown = call("inspect", tmp_path / "adapter.gguf").stdout
    assert "experts.*.ffn_up_exps" in shown and "Look at: ΔW is zero in" in shown
    with pytest.raises(LayoutMismatch, match="is one expert of many"):
        call(tmp_path / "mlx", tmp_path / "peft", "--to", "peft")


def test_experts_that_the_base_does_not_have(moe: Moe, tmp_path: Path) -> None:
    one = LowRank(np.ones((2, 64), np.float32), np.ones((INNER, 2), np.float32))
    wide = LowRank(np.ones((2, 65), np.float32), np.ones((INNER, 2), np.float32))
    name = "model.layers.{}.block_sparse_moe.experts.{}.w1"
    for made, said in (
        ({name.format(0, 4): one}, "there is no expert 4, the base has 4"),
        ({name.format(3, 0): one}, "the base has no layer model.layers.3"),
        ({name.format(0, 0): one, name.format(0, 1): wide}, "not of one shape"),
    ):
        for write in (mlx.write, gguf_adapter.write):
            with pytest.raises(LayoutMismatch, match=said):
                write(Adapter(made), tmp_path / "out", moe.base)
    assert not list(tmp_path.iterdir())
    assert experts.is_expert(name.format(0, 0)) and not experts.is_expert("model.layers.0.self_attn.q_proj")
    with pytest.raises(LayoutMismatch, match="PEFT has no adapter for single experts"):
        peft.write(Adapter({name.format(0, 0): one}), tmp_path / "peft", base_model="x")
