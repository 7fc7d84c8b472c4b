"""Tiny Llama models with random weights, whole folders with a tokenizer, and the references to hold conversions to.

Every matrix is non-square, attention is grouped-query, norms are not ones, and logits are of the size of a real
model's: a wrong transpose, permutation or scale shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from converters.gguf import tokenizer as ours

VOCAB = 384
CORPUS = ["The patient had 12 visits in 2024.", "One round of averaging, and it's done.", "naïve Σ 🦙  two  spaces\n\n"]
PROMPT = [5, 17, 200, 33, 8, 301, 77, 120, 9, 64, 250, 31]
TEXTS = [*CORPUS, " I'VE 3 33 33333 (ok)", "tabs\t\tand\n \n lines", "é́ 中文 текст"]

PRE_TOKENIZERS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(ours._LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(ours._QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def save_tokenizer(folder: Path, pre: str = "gpt-2", bos: bool = False) -> None:
    """Train a byte-level BPE tokenizer and save it as transformers does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    steps = PRE_TOKENIZERS[pre]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,  # fewer than the model's, as in many checkpoints
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def config(tied: bool, **more: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "attention_bias": not tied,
        "initializer_range": 0.12,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return LlamaConfig(**{**settings, **more})


def save_model(folder: Path, settings: LlamaConfig, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, **saving)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1, **settings: Any) -> Path:
    """A PEFT adapter with random factors, B too."""
    chosen = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def torch_model(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model


def torch_logits(base: Path, adapter: Path | None = None) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(torch_model(base, adapter)(torch.tensor([PROMPT])).logits[0].numpy())


def mlx_logits(base: Path, adapter: Path | None = None) -> NDArray[np.float32]:
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    model, _ = load(str(base), adapter_path=str(adapter) if adapter else None)
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))
