"""Pretrain the demo's base model: a small Llama on the source of Python's standard library.

    python benchmarks/pretrain.py --out benchmarks/base --minutes 50

The packages in LEFT_OUT, and their tests, are never seen: the demo's clients hold them as private
data, so fine-tuning has something to teach. Progress goes to stderr; the last thing on stdout is
one JSON document, which is also written as training.json beside the model.

The same settings, seed, machine and versions give the same weights. `--minutes` measures the
machine's speed and turns it into a number of steps; `--steps` repeats an earlier run exactly.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

LEFT_OUT = ("asyncio", "email", "xml", "multiprocessing", "http", "unittest", "logging", "urllib", "importlib", "json")
LEFT_OUT_TEST = re.compile(  # how the name of a file or folder that tests them begins
    rf"_?test_({'|'.join(LEFT_OUT)}|sax|minidom|pulldom|pyexpat|docxmlrpc|robotparser|urlparse|import|zipimport\.)"
    "|_test_venv_multiprocessing|xmltests|mp_"
)
# Tables, generated text, and Python 2: big, and nothing to learn a style from.
DROPPED = ("encodings", "pydoc_data", "lib2to3/tests/data", "_sysconfigdata")
TABLE_SHARE = 0.12  # a file with more digits and backslashes than this is a table

END = "<|endoftext|>"  # starts every document; both bos and eos
PAD = "<|pad|>"
CONTEXT = 512  # tokens


@dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from the corpus. Each field is an option of the same name."""

    out: Path = field(default=Path("benchmarks/base"), metadata={"help": "folder to write"})
    minutes: float = field(default=50.0, metadata={"help": "training time to aim for"})
    steps: int = field(default=0, metadata={"help": "optimizer steps; 0 derives them from minutes"})
    seed: int = field(default=0, metadata={"help": "of the weights and of the order of the data"})
    hidden: int = field(default=256, metadata={"help": "width of the residual stream"})
    layers: int = field(default=5, metadata={"help": "decoder layers"})
    intermediate: int = field(default=768, metadata={"help": "width of the MLP"})
    heads: int = field(default=8, metadata={"help": "query heads"})
    kv_heads: int = field(default=4, metadata={"help": "key and value heads"})
    vocab: int = field(default=4096, metadata={"help": "tokens, the two special ones included"})
    batch: int = field(default=4, metadata={"help": f"sequences of {CONTEXT} tokens a step"})
    lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate"})
    warmup: int = field(default=200, metadata={"help": "steps of linear warm-up"})
    threads: int = field(default=2, metadata={"help": "of torch"})
    points: int = field(default=5, metadata={"help": "of the loss curve; an interim model is written at each"})
    compile: bool = field(default=True, metadata={"help": "torch.compile; needs a C++ compiler"})


def parse_settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        flag = isinstance(f.default, bool)
        kind = {"action": argparse.BooleanOptionalAction} if flag else {"type": type(f.default)}
        text = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    return Settings(**vars(parser.parse_args()))


# --- corpus ---------------------------------------------------------------------------------------


def is_left_out(path: str) -> bool:
    """Whether a file (posix path inside the standard library) is of a left-out package or tests one."""
    parts = path.split("/")
    return parts[0] in LEFT_OUT or any(LEFT_OUT_TEST.match(part) for part in parts)


def read_corpus() -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, str]]]:
    """The standard library's source as {path: text}: to train on, held out, and left out by package."""
    root = Path(sysconfig.get_path("stdlib"))
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    left_out: dict[str, dict[str, str]] = {name: {} for name in LEFT_OUT}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if "site-packages" in file.parts or "__pycache__" in file.parts or path.startswith(DROPPED):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a test's deliberately odd encoding
            continue
        package = path.split("/")[0]
        if is_left_out(path):
            if package in LEFT_OUT and "/test/" not in path:
                left_out[package][path] = text
        elif sum(text.count(c) for c in "0123456789\\") <= TABLE_SHARE * len(text):
            # The hash of the name chooses, so that a file keeps its side when others come or go.
            chosen = hashlib.sha256(path.encode()).digest()[0] < 4
            (held_out if chosen else train)[path] = text
    return train, held_out, left_out


def train_tokenizer(texts: dict[str, str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's split pattern (llama.cpp's pre-tokenizer `gpt-2`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, seen or not
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: dict[str, str]) -> list[np.ndarray]:
    """One uint16 array a document, each beginning with END."""
    end = tokenizer.token_to_id(END)
    encodings = tokenizer.encode_batch_fast(list(texts.values()))
    return [np.array([end, *e.ids], dtype=np.uint16) for e in encodings]


def batches(documents: list[np.ndarray], batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless (batch, CONTEXT + 1) int64, packed; documents are reshuffled and recut every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        stream = stream[rng.integers(CONTEXT) :]
        starts = rng.permutation((len(stream) - 1) // CONTEXT) * CONTEXT
        for i in range(0, len(starts) - batch + 1, batch):
            rows = [stream[s : s + CONTEXT + 1] for s in starts[i : i + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


# --- model ----------------------------------------------------------------------------------------


def model_config(s: Settings) -> dict[str, object]:
    """config.json, in the spelling that every transformers, llama.cpp and mlx-lm reads."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    sizes = {"hidden_size": s.hidden, "intermediate_size": s.intermediate, "num_hidden_layers": s.layers}
    heads = {"num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.hidden // s.heads}
    position = {"max_position_embeddings": CONTEXT, "rope_theta": 10000.0}
    tokens = {"vocab_size": s.vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    rest = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02}
    return kind | sizes | heads | position | tokens | rest


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross-entropy in nats of rows[:, 1:] given rows[:, :-1]; rows is (B, T + 1), -100 ignored."""
    hidden = model.model(input_ids=rows[:, :-1].clamp(min=0)).last_hidden_state  # (B, T, H)
    logits = F.linear(hidden, model.lm_head.weight)  # (B, T, V)
    targets = rows[:, 1:].reshape(-1)
    return F.cross_entropy(logits.float().flatten(0, 1), targets, reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, float]:
    """Loss over whole texts, cut in windows of CONTEXT so that each token is predicted once."""
    ids = np.concatenate(encode(tokenizer, texts)).astype(np.int64)
    windows = math.ceil((len(ids) - 1) / CONTEXT)
    padded = np.full(windows * CONTEXT + 1, -100, dtype=np.int64)
    padded[: len(ids)] = ids
    rows = torch.from_numpy(padded).unfold(0, CONTEXT + 1, CONTEXT)  # (windows, CONTEXT + 1)
    nats = sum(float(token_losses(model, chunk, "sum")) for chunk in torch.split(rows, 16))
    tokens, size = len(ids) - 1, sum(len(text.encode()) for text in texts.values())
    return {
        "files": len(texts),
        "bytes": size,
        "tokens": tokens,
        "loss_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def learning_rate(step: int, s: Settings, steps: int) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from zero."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (steps - s.warmup)))


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Atomically: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, document: object) -> None:
    write(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    write(out / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    special = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    behaviour = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", kind | special | behaviour)
    write_json(out / "special_tokens_map.json", special)


def write_weights(out: Path, model: LlamaForCausalLM) -> None:
    """model.safetensors in bfloat16; the output head is the embedding and is not stored twice."""
    state = {k: v.bfloat16() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    part = out / "model.safetensors.part"
    save_file(state, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors makes it private
    part.replace(out / "model.safetensors")


def machine(threads: int) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": name[1] if name else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


# --- training -------------------------------------------------------------------------------------


def steps_in(minutes: float, gradients: Callable[[torch.Tensor], float], s: Settings) -> int:
    """Steps that fit in `minutes`, from timing a few empty batches; changes no weights."""
    rows = torch.zeros(s.batch, CONTEXT + 1, dtype=torch.int64)
    gradients(rows)  # compiles
    started = time.monotonic()
    for _ in range(10):
        gradients(rows)
    return max(1, int(60 * minutes / (time.monotonic() - started) * 10))


def train(
    model: LlamaForCausalLM, data: Iterator[torch.Tensor], s: Settings, at_point: Callable[[dict[str, float]], None]
) -> dict[str, float]:
    """Train in place; `at_point` gets each point of the loss curve. Returns how much was seen, and how fast."""
    loss_of = torch.compile(token_losses) if s.compile else token_losses

    def gradients(rows: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):  # fp32 weights, bf16 products
            loss: torch.Tensor = loss_of(model, rows, "mean")
        torch.autograd.backward(loss)
        return loss.item()

    steps = s.steps or steps_in(s.minutes, gradients, s)
    model.zero_grad(set_to_none=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    seen: dict[str, float] = {}
    started = time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, s, steps)
            losses.append(gradients(next(data)))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(task, advance=1, description=f"step {step}/{steps} loss {losses[-1]:.3f}")
            if step == steps or step % math.ceil(steps / s.points) == 0:
                seconds, tokens = time.monotonic() - started, step * s.batch * CONTEXT
                seen = {"steps": step, "tokens_seen": tokens, "seconds": round(seconds)}
                at_point(seen | {"train_loss": round(sum(losses) / len(losses), 4)})
                losses.clear()
    return seen | {"tokens_per_second": round(tokens / seconds)}


def main() -> None:
    s = parse_settings()
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    torch.use_deterministic_algorithms(True)  # or the embedding's gradient is summed in any order

    texts, held_out, left_out = read_corpus()
    tokenizer = train_tokenizer(texts, s.vocab)
    documents = encode(tokenizer, texts)
    config = model_config(s)
    model = LlamaForCausalLM(LlamaConfig(**config))

    s.out.mkdir(parents=True, exist_ok=True)
    write_json(s.out / "config.json", config)
    write_json(s.out / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
    write_tokenizer(s.out, tokenizer)

    curve: list[dict[str, float]] = []
    record: dict[str, Any] = {
        "finished": False,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {k: v for k, v in asdict(s).items() if k != "out"},
        "optimizer": "AdamW, betas 0.9 and 0.95, weight decay 0.1 on matrices, clip 1.0, warm-up, cosine to 0",
        "machine": machine(s.threads),
        "corpus": {
            "files": len(texts),
            "bytes": sum(len(text.encode()) for text in texts.values()),
            "tokens": sum(len(document) for document in documents),
            "sha256": hashlib.sha256("\0".join(texts.values()).encode()).hexdigest(),
            "left_out": LEFT_OUT,
            "held_out_files": list(held_out),
        },
        "curve": curve,
    }

    def at_point(point: dict[str, float]) -> None:
        curve.append(point | {"held_out_loss": evaluate(model, tokenizer, held_out)["loss_per_token"]})
        write_weights(s.out, model)
        write_json(s.out / "training.json", record)

    record |= train(model, batches(documents, s.batch, s.seed), s, at_point)

    # What is reported is measured on what is stored: weights rounded to bfloat16, sums in float32.
    stored = LlamaForCausalLM.from_pretrained(s.out, dtype=torch.float32)
    record["held_out"] = evaluate(stored, tokenizer, held_out)
    record["left_out"] = {name: evaluate(stored, tokenizer, files) for name, files in left_out.items()}
    record["finished"] = True
    write_json(s.out / "training.json", record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
