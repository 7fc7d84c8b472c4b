"""A tiny Llama, made on the spot: grouped-query, non-square in every layer, tied or untied; and a job's pieces."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from converters.adapter import Adapter, LowRank, Shape
from edge_client.data.tokenize import Example

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 61, 24, 40, 2, 4, 2, 8


def modules(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Shape]:
    """All linear layers of a Llama, and their shapes (out, in)."""
    shapes = {
        "self_attn.q_proj": Shape(heads * head_dim, hidden),
        "self_attn.k_proj": Shape(kv_heads * head_dim, hidden),
        "self_attn.v_proj": Shape(kv_heads * head_dim, hidden),
        "self_attn.o_proj": Shape(hidden, heads * head_dim),
        "mlp.gate_proj": Shape(inner, hidden),
        "mlp.up_proj": Shape(inner, hidden),
        "mlp.down_proj": Shape(hidden, inner),
    }
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}


def modules_of(folder: Path) -> dict[str, Shape]:
    config = json.loads((folder / "config.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return modules(*(config[key] for key in (*keys, *heads)))


def llama(folder: Path, *, tied: bool, hidden: int = HIDDEN, inner: int = INNER, kv_heads: int = KV_HEADS) -> Path:
    """Write a random model in the Hugging Face layout."""
    rng = np.random.default_rng(1)
    shapes = modules(hidden, inner, LAYERS, HEADS, kv_heads, HEAD_DIM)
    tensors = {f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["model.embed_tokens.weight"] = rng.normal(0, 0.5, (VOCAB, hidden)).astype(np.float32)
    norms = [f"model.layers.{i}.{n}layernorm" for i in range(LAYERS) for n in ("input_", "post_attention_")]
    for name in ("model.norm", *norms):
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    if not tied:
        tensors["lm_head.weight"] = rng.normal(0, 0.5, (VOCAB, hidden)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        # The dropout that transformers would apply in training mode and mlx-lm does not know.
        "attention_dropout": 0.5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def examples(count: int = 60, seed: int = 0, lengths: tuple[int, int] = (3, 20)) -> list[Example]:
    """Random ids of so many tokens, from the least to the most, whose first few are not targets."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(lengths[0], lengths[1] + 1, count):
        is_target = np.arange(length) >= rng.integers(1, length)
        made.append(Example(rng.integers(0, VOCAB, length).astype(np.int32), is_target))
    return made


def nonzero(shapes: dict[str, Shape], ranks: tuple[int, ...]) -> Adapter:
    """An adapter with B away from zero; ranks take turns."""
    rng = np.random.default_rng(2)
    return Adapter(
        {
            name: LowRank(
                rng.normal(0, 0.1, (rank, shape.into)).astype(np.float32),
                rng.normal(0, 0.1, (shape.out, rank)).astype(np.float32),
            )
            for i, (name, shape) in enumerate(shapes.items())
            for rank in [ranks[i % len(ranks)]]
        }
    )
