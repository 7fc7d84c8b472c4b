"""A small Llama that many clients train LoRA on at once: one base, and factors for each client.

Clients of one cohort share everything but their factors, so a step of all of them is one pass over the base and one
batched product for each adapted layer. That is what makes hundreds of runs a matter of minutes; the arithmetic is that
of `edge_client.backends`, and a test holds the two to each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from converters.architectures import Shape

LOGITS_AT_ONCE = 1 << 18  # elements: a megabyte
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Factors = Mapping[str, tuple[Tensor, Tensor]]  # by module: A (C, r, in), B (C, out, r); ΔW = B A


@dataclass(frozen=True)
class Llama:
    """Weights by the names of transformers, in float32, and the few settings that a forward pass needs."""

    config: Mapping[str, object]
    weights: Mapping[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Llama:
        """A folder as transformers writes it. Output embeddings are tied if they are not stored."""
        weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        return cls(json.loads((folder / "config.json").read_text("utf-8")), weights)

    @classmethod
    def unpretrained(cls, folder: Path, seed: int) -> Llama:
        """The same architecture with the random weights that its pretraining began from: normal, σ as configured."""
        like = cls.load(folder)
        generator = torch.Generator().manual_seed(seed)
        spread = float(like.config["initializer_range"])  # type: ignore[arg-type]

        def drawn(tensor: Tensor) -> Tensor:
            return (
                torch.ones_like(tensor) if tensor.ndim == 1 else spread * torch.randn(tensor.shape, generator=generator)
            )

        return cls(like.config, {name: drawn(tensor) for name, tensor in sorted(like.weights.items())})

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every linear layer but the head: what `all-linear` adapts."""
        ends = tuple(f"{part}.weight" for part in _LINEAR)
        return {
            name.removesuffix(".weight"): Shape(*tensor.shape)
            for name, tensor in self.weights.items()
            if name.endswith(ends)
        }

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())

    def merged(self, updates: Mapping[str, Tensor]) -> Llama:
        """With ΔW (out, in) added, by module."""
        added = {f"{name}.weight": self.weights[f"{name}.weight"] + delta for name, delta in updates.items()}
        return Llama(self.config, {**self.weights, **added})

    def hidden(self, ids: Tensor, factors: Factors | None = None) -> Tensor:
        """Last hidden states (C, N, T, D) of ids (C, N, T), N sequences of each client; causal, positions from 0."""
        clients, rows, length = ids.shape
        heads, kv_heads, size = (self._int(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        eps = float(self.config["rms_norm_eps"])  # type: ignore[arg-type]

        def linear(name: str, x: Tensor) -> Tensor:  # x (C, N·T, in)
            y = functional.linear(x, self.weights[f"{name}.weight"])
            if factors is None:
                return y
            a, b = factors[name]
            return torch.baddbmm(y, x @ a.mT, b.mT)

        def norm(name: str, x: Tensor) -> Tensor:
            return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], eps)

        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(clients * rows, length, heads, size).transpose(1, 2)  # (C·N, H, T, size)

        cos, sin = self._rotation(length, size)
        x = functional.embedding(ids.view(clients, rows * length), self.weights["model.embed_tokens.weight"])
        for layer in range(self._int("num_hidden_layers")):
            at = f"model.layers.{layer}"
            y = norm(f"{at}.input_layernorm", x)
            q, k = (
                _rotated(split(linear(f"{at}.self_attn.{part}_proj", y), n), cos, sin)
                for part, n in (("q", heads), ("k", kv_heads))
            )
            v = split(linear(f"{at}.self_attn.v_proj", y), kv_heads)
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            x = x + linear(f"{at}.self_attn.o_proj", seen.transpose(1, 2).reshape(clients, rows * length, heads * size))
            y = norm(f"{at}.post_attention_layernorm", x)
            gate = functional.silu(linear(f"{at}.mlp.gate_proj", y))
            x = x + linear(f"{at}.mlp.down_proj", gate * linear(f"{at}.mlp.up_proj", y))
        return norm("model.norm", x).view(clients, rows, length, -1)

    def losses(self, hidden: Tensor, labels: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy in nats (targets,) of hidden states (targets, D), and the gradient of Σ shares·losses by them.

        In pieces that stay in the processor's cache; the gradient is softmax − one-hot, made in place.
        """
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        rows = max(1, LOGITS_AT_ONCE // head.shape[0])
        losses, back = torch.empty(len(labels)), None if shares is None else torch.empty_like(hidden)
        for begin in range(0, len(labels), rows):
            piece = slice(begin, begin + rows)
            logits, label = functional.linear(hidden[piece], head), labels[piece, None]
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, label)[:, 0]
            total = logits.exp_().sum(1, keepdim=True)
            losses[piece] = total[:, 0].log() - right
            if shares is not None and back is not None:
                logits *= shares[piece, None] / total
                logits.scatter_add_(1, label, -shares[piece, None])
                torch.mm(logits, head, out=back[piece])
        return losses, back

    def _int(self, key: str) -> int:
        return int(self.config[key])  # type: ignore[call-overload,no-any-return]

    def _rotation(self, length: int, size: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, size) of rotary positions, in transformers' order of halves."""
        theta = float(self.config["rope_theta"])  # type: ignore[arg-type]
        frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        both = torch.cat([angles, angles], dim=-1)
        return both.cos(), both.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
