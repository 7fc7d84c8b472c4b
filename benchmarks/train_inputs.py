"""What bench_train.py gives to everybody: a base with random weights, rows of public datasets, one plan and recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.adapter import Adapter
    from edge_client.data.batches import Batches
    from edge_client.training.recipe import Recipe

Found = dict[str, Any]

PASSES = 2  # the first is everybody's warm-up: allocators, compiled shapes, the page cache
SHARED = Path(__file__).parents[2] / "shared" / "data"
SHAPES: dict[str, dict[str, int]] = {
    "28m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "1b": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


@dataclass(frozen=True)
class Task:
    """What everybody is given."""

    work: Path
    shape: str  # of SHAPES
    data: str  # of the datasets
    batch_size: int
    max_seq_len: int
    rank: int
    alpha: float
    learning_rate: float

    @property
    def base(self) -> Path:
        return self.work / f"base-{self.shape}"

    @property
    def rows(self) -> Path:
        """A folder with train.jsonl."""
        return self.work / self.data


def pairs(data: str) -> Iterator[tuple[str, str]]:
    """Prompts and completions."""
    if data == "gsm8k":
        for line in (SHARED / "gsm8k/train.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            yield row["question"] + "\n", row["answer"]
    else:
        for row in json.loads((SHARED / "dolly15k_fed10/local_training_4.json").read_text("utf-8")):
            yield f"{row['instruction']}\n{row['context']}".strip() + "\n", row["response"]


def make_base(folder: Path, shape: dict[str, int], datasets: list[str]) -> None:
    """A Llama with random weights in bfloat16, as bases come, and a byte-level BPE of the datasets."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "ready").exists():
        return
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=shape["vocab_size"],
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((prompt + answer for data in datasets for prompt, answer in pairs(data)), trainer)
    end, pad = "<|endoftext|>", "<|pad|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad).save_pretrained(folder)
    torch.manual_seed(0)
    more = {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, **more, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "ready").touch()


def make_inputs(task: Task, datasets: list[str], count: int) -> Found:
    """The base, and of each dataset the first rows of which something is left to learn when they are cut."""
    import torch

    from edge_client.data import tokenize
    from edge_client.data.rows import Dialogue

    if task.shape == "1b" and not torch.cuda.is_available():
        sys.exit("--cuda needs a GPU that PyTorch can use, and there is none")
    make_base(task.base, SHAPES[task.shape], datasets)
    tokenizer = tokenize.load_tokenizer(task.base)
    found: Found = {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "datasets": {}}
    for data in datasets:
        lines, kept = [], []
        for pair in pairs(data):
            made = tokenize.tokenise([Dialogue(data, (), plain=pair)], tokenizer, task.max_seq_len)
            if made.examples:
                kept += made.examples
                lines.append(json.dumps(dict(zip(("prompt", "completion"), pair, strict=True))) + "\n")
            if len(lines) == count:
                break
        folder = task.work / data
        folder.mkdir(exist_ok=True)
        (folder / "train.jsonl").write_text("".join(lines), "utf-8")
        (folder / "valid.jsonl").write_text(lines[0], "utf-8")  # so that none of them is held out
        lengths = [len(example.ids) for example in kept]
        found["datasets"][data] = {
            "examples": len(kept),
            "targets": sum(example.num_targets for example in kept),
            "tokens": sum(lengths),
            "longest": max(lengths),
        }
    if found["cuda"]:
        found["gpu"] = torch.cuda.get_device_name()
    return found


def prepared(task: Task) -> tuple[Batches, Adapter, Recipe]:
    from converters import adapter, architectures
    from edge_client.data import tokenize
    from edge_client.data.batches import Batches
    from edge_client.training.recipe import Recipe
    from oneround.v1 import federation_pb2 as pb

    rows = tokenize.load(task.rows).train
    made = tokenize.tokenise(rows, tokenize.load_tokenizer(task.base), task.max_seq_len)
    plan = Batches(made.examples, task.batch_size, PASSES, seed=0)
    lora = pb.LoraSpec(rank=task.rank, alpha=task.alpha)
    spec = pb.JobSpec(lora=lora, train=pb.TrainSpec(learning_rate=task.learning_rate, schedule="linear"))
    initial = adapter.initial(architectures.describe(task.base).linears, task.rank, seed=0)
    return plan, initial, Recipe.from_spec(spec, plan.total_steps)
