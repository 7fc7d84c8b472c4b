"""A tiny model of every family with random weights, and tokenizers of every kind that they come with.

As in `tiny`, matrices are not square (but for q and o of Qwen2 and Phi-3, which have to be), attention is grouped-query
and norms are not ones. Prompts are longer than the sliding windows that llama.cpp has.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from converters.gguf import tokenizer as ours
from tests.converters import tiny

VOCAB = 448
PROMPT = [(7 * n * n + 11 * n + 5) % 300 for n in range(40)]
TEXTS = [*tiny.TEXTS, "a\n\nb\n\n\nc", "   three", "<|end|> she said", "l'été 3.14"]
LONG = [round(1.0 + 0.9 * n, 2) for n in range(6)]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


class Kind(NamedTuple):
    """A configuration, what differs from the common sizes, and the kind of tokenizer."""

    config: type
    tokenizer: str
    tied: bool
    more: Mapping[str, Any]


KINDS = {
    "llama-2": Kind(LlamaConfig, "llama-2", False, {"head_dim": 24}),
    "llama-3": Kind(LlamaConfig, "llama-bpe", True, {"head_dim": 24, "rope_parameters": LLAMA3_ROPE}),
    "smollm2": Kind(LlamaConfig, "smollm", True, {"head_dim": 24}),
    "mistral": Kind(MistralConfig, "llama-2", False, {"head_dim": 24}),
    "qwen2": Kind(Qwen2Config, "qwen2", False, {}),
    "qwen2-tied": Kind(
        Qwen2Config,
        "qwen2",
        True,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": Kind(Qwen3Config, "qwen2", True, {"head_dim": 24}),
    "qwen3-untied": Kind(Qwen3Config, "qwen2", False, {"head_dim": 24}),
    "gemma2": Kind(
        Gemma2Config,
        "gemma",
        True,
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "bos_token_id": 2,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": Kind(
        Gemma3TextConfig,
        "gemma",
        True,
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "bos_token_id": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "gemma3-untied": Kind(
        Gemma3TextConfig,
        "gemma",
        False,
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "final_logit_softcapping": 5.0,
            "bos_token_id": 2,
        },
    ),
    "phi-3": Kind(Phi3Config, "phi-3", False, {"sliding_window": 200}),
    "phi-4-mini": Kind(
        Phi3Config,
        "gpt-4o",
        True,
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5],
                "long_factor": LONG,
            },
        },
    ),
}


def config(kind: str, **more: Any) -> Any:
    chosen = KINDS[kind]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": chosen.tied,
        "initializer_range": 0.12,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return chosen.config(**{**settings, **chosen.more, **more})


def save(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "150KB", **more: Any
) -> Path:
    """A whole folder, its weights in several files."""
    return save_config(folder, config(kind, **more), KINDS[kind].tokenizer, dtype, max_shard_size)


def save_config(
    folder: Path, settings: Any, tokenizer: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "150KB"
) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder, tokenizer)
    return folder


def model_class(kind: str) -> str:
    return type(AutoModelForCausalLM.from_config(config(kind, num_hidden_layers=1))).__name__


def texts(kind: str) -> list[str]:
    """llama.cpp's expression for gpt-4o takes no combining marks into words, and tokenizer.json's does."""
    return [text for text in TEXTS if KINDS[kind].tokenizer != "gpt-4o" or "\u0301" not in text]


def with_config(folder: Path, copy: Path, more: Mapping[str, Any]) -> Path:
    """A copy whose config.json says something else."""
    shutil.copytree(folder, copy)
    said = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**said, **more}))
    return copy


def as_on_the_hub(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json held before transformers 5: `rope_scaling` beside `rope_theta`, and no `rope_parameters`."""
    config = dict(config)
    rope = config.pop("rope_parameters", None) or {}
    if "full_attention" in rope:
        near, rope = rope["sliding_attention"], rope["full_attention"]
        config["rope_local_base_freq"] = near["rope_theta"]
        config["sliding_window_pattern"] = 6
        config.pop("layer_types", None)
    config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if (kind := scaling.pop("rope_type", "default")) != "default":
        config["rope_scaling"] = {"type": kind, **scaling}
    return config


def without(folder: Path, copy: Path, left_out: str) -> Path:
    """A copy without a file, or without a key of tokenizer_config.json."""
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != left_out}))
    (copy / left_out).unlink(missing_ok=True)
    return copy


def bound(kind: str) -> float:
    """How far llama.cpp's logits, of about ±4, may be off. Measured: at most 8e-6, with adapters 2e-5; and 3e-3 for
    Gemma, whose GELU llama.cpp looks up in a table from float16 to float16."""
    return 8e-3 if KINDS[kind].tokenizer == "gemma" else 1e-4


def torch_logits(folder: Path, adapter: Path | None = None, prompt: Sequence[int] = PROMPT) -> NDArray[np.float32]:
    """With eager attention, the one that has Gemma 2's soft caps."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([list(prompt)])).logits[0].numpy())


# Tokenizers

SENTENCEPIECE = ("llama-2", "gemma", "phi-3")
_SPECIAL = {"llama-2": ["<unk>", "<s>", "</s>"], "gemma": ["<pad>", "<eos>", "<bos>", "<unk>"]}
_SPECIAL["phi-3"] = _SPECIAL["llama-2"]
ADDED = {  # behind the model's own pieces if they are not of them, with whether they are special
    "llama-2": {},
    "gemma": {"<start_of_turn>": True, "\n\n": False},
    "phi-3": {"<|endoftext|>": True, "<|end|>": True, "<|user|>": True},
}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def save_tokenizer(folder: Path, kind: str) -> None:
    if kind in SENTENCEPIECE:
        _save_sentencepiece(folder, kind)
    elif kind == "gpt-4o":
        _save_gpt4o(folder)
    else:
        tiny.save_tokenizer(folder, kind, bos=kind == "llama-bpe")


def _save_gpt4o(folder: Path) -> None:
    """As Phi-4-mini's: what the expression matches is kept by removing everything else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ours._GPT4O), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=["<|endoftext|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def _save_sentencepiece(folder: Path, kind: str) -> None:
    """tokenizer.json, tokenizer.model and a tokenizer_config.json that lists the added tokens, as on the hub."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    letters = [token for token in learnt["vocab"] if token not in {"".join(pair) for pair in merges}]
    if kind == "gemma":  # runs of spaces are pieces of their own
        merges.append(("▁", "▁"))

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*_SPECIAL[kind], *bytes_, *dict.fromkeys("".join(pair) for pair in merges), *letters]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    behind = [token for token in ADDED[kind] if token not in vocab]
    numbers = {**vocab, **{token: len(vocab) + n for n, token in enumerate(behind)}}
    assert len(vocab) + len(behind) <= VOCAB
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = spaces if kind == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    if kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tail = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    tokenizer.add_special_tokens(_SPECIAL[kind])
    for token, special in ADDED[kind].items():
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    bos, eos = ("<bos>", "<eos>") if kind == "gemma" else ("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)

    saved = folder / "tokenizer_config.json"
    decoder = {
        str(number): {"content": token, "special": ADDED[kind].get(token, True)}
        for token, number in numbers.items()
        if token in _SPECIAL[kind] or token in ADDED[kind]
    }
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "added_tokens_decoder": decoder}))
    ranks = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(merges)])}
    scored = [(piece, *_kind(piece, kind, ranks, len(merges) + number)) for piece, number in vocab.items()]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(scored, prefix=kind != "gemma"))


def _kind(piece: str, kind: str, ranks: Mapping[str, float], last: int) -> tuple[float, int]:
    """Score and type, as SentencePiece numbers them."""
    if piece in _SPECIAL[kind]:
        return 0.0, 2 if piece == "<unk>" else 3
    if piece in ADDED[kind]:
        return 0.0, 4
    if piece.startswith("<0x"):
        return 0.0, 6
    return ranks.get(piece, -float(last)), 1


def sentencepiece_model(pieces: Sequence[tuple[str, float, int]], prefix: bool) -> bytes:
    """A ModelProto: the pieces, a BPE trainer with byte fallback, and a normaliser that leaves everything as it is."""
    model = b""
    for text, score, kind in pieces:
        model += _message(1, _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
    unknown = next(number for number, piece in enumerate(pieces) if piece[2] == 2)
    trainer = _number(3, 2) + _number(35, 1) + _number(40, unknown) + _number(41, 1) + _number(42, 2)
    normalizer = _message(1, b"identity") + _number(3, int(prefix)) + _number(4, 0) + _number(5, 1)
    return model + _message(2, trainer) + _message(3, normalizer)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
