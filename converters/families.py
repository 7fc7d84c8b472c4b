"""The families of base models that are known here, and what a described model is.

A family is one entry of `FAMILIES`: its layers as transformers names them, the values that its config.json may leave
out, and what llama.cpp does differently. Its keys in GGUF are in `hyperparameters`.

Sources: transformers' configuration and modelling code for names, shapes and defaults; llama.cpp's conversion package
for the interleaving and the norms, and its src/models for activations and biases.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from converters.adapter import Shape
from oneround.errors import BadModel


class NotKnownHere(BadModel):
    """A model or a tokenizer that llama.cpp has, or may have, and this package has not."""

    def __init__(self, message: str) -> None:
        two_ways_out = "give a base GGUF as the job's model.gguf, or put llama.cpp's convert_hf_to_gguf.py on PATH"
        super().__init__(message, hint=two_ways_out)


class Linear(NamedTuple):
    """A linear layer of a block: names of its sizes, and of the head count whose RoPE pairs llama.cpp interleaves."""

    out: str
    into: str
    heads: str = ""


@dataclass(frozen=True)
class Family:
    """What models of one kind share."""

    arch: str  # general.architecture in GGUF
    linears: Mapping[str, Linear]  # by name within a block
    activations: tuple[str, ...]  # what llama.cpp computes for this architecture, whatever the config says
    activation_key: str = "hidden_act"  # in config.json
    biases: frozenset[str] = frozenset()  # linears whose bias llama.cpp has a place for
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of config.json, where transformers has its own
    free_heads: bool = True  # heads need not add up to the hidden size
    untied: bool = True  # llama.cpp has an output layer that is not the embedding
    norm_shift: float = 0.0  # what a norm's weight is more in GGUF than in the checkpoint
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"  # the last one
    output: str = "lm_head"


@dataclass(frozen=True)
class Base:
    """A base model, as far as adapters and GGUF files need to know it."""

    name: str  # the class in transformers, LlamaForCausalLM for one
    family: Family
    config: Mapping[str, Any]  # config.json over the family's defaults
    dtype: str  # of the checkpoint's matrices: f32, f16 or bf16
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool  # lm_head is the embedding
    linears: Mapping[str, Shape]  # every linear layer of the blocks, (out, in), by transformers' module name

    @property
    def arch(self) -> str:
        """`general.architecture` in GGUF."""
        return self.family.arch


@functools.lru_cache(maxsize=8)
def names_in_gguf(arch: str, n_layers: int) -> gguf.TensorNameMap:
    """The gguf package's names for a checkpoint's tensors; KeyError when it does not know the architecture."""
    numbers: dict[str, Any] = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[arch], n_layers)


def interleaved(rows: int, heads: int) -> NDArray[np.intp]:
    """For each of llama.cpp's rows the checkpoint's: it rotates neighbouring pairs, transformers a head's two halves,
    so a matrix goes from (heads, 2, d/2) to (heads, d/2, 2)."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


_SPLIT = {
    "self_attn.q_proj": Linear("heads", "hidden"),
    "self_attn.k_proj": Linear("kv_heads", "hidden"),
    "self_attn.v_proj": Linear("kv_heads", "hidden"),
    "self_attn.o_proj": Linear("hidden", "heads"),
    "mlp.gate_proj": Linear("intermediate", "hidden"),
    "mlp.up_proj": Linear("intermediate", "hidden"),
    "mlp.down_proj": Linear("hidden", "intermediate"),
}
_FUSED = {
    "self_attn.qkv_proj": Linear("qkv", "hidden"),
    "self_attn.o_proj": Linear("hidden", "heads"),
    "mlp.gate_up_proj": Linear("gate_up", "hidden"),
    "mlp.down_proj": Linear("hidden", "intermediate"),
}
_INTERLEAVED = {
    "self_attn.q_proj": Linear("heads", "hidden", "n_heads"),
    "self_attn.k_proj": Linear("kv_heads", "hidden", "n_kv_heads"),
}
_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)

LLAMA = Family(
    arch="llama",
    linears={**_SPLIT, **_INTERLEAVED},
    activations=_SILU,
    biases=frozenset(_SPLIT),
    defaults={"max_position_embeddings": 2048},
)
MISTRAL = replace(LLAMA, defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8})
QWEN2 = Family(
    arch="qwen2",
    linears=_SPLIT,
    activations=_SILU,
    biases=_QKV,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    free_heads=False,
)
QWEN3 = replace(QWEN2, arch="qwen3", defaults={**QWEN2.defaults, "head_dim": 128}, free_heads=True)
GEMMA2 = Family(
    arch="gemma2",
    linears=_SPLIT,
    activations=_GELU,
    activation_key="hidden_activation",
    biases=_QKV,
    defaults={
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    untied=False,
    norm_shift=1.0,
)
GEMMA3 = replace(
    GEMMA2,
    arch="gemma3",
    defaults={
        **GEMMA2.defaults,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    untied=True,
)
PHI3 = Family(
    arch="phi3",
    linears=_FUSED,
    activations=_SILU,
    biases=frozenset({"self_attn.qkv_proj"}),
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    free_heads=False,
)

FAMILIES: dict[str, Family] = {  # by the class in transformers
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Phi3ForCausalLM": PHI3,
}
