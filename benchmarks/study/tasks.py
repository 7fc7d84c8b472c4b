"""Datasets → who holds which examples: train by client, and one validation and one test set for everybody.

Test and validation rows do not depend on the seed; which rows are trained on, and who has them, does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import stdlib_packages

from edge_client.data.rows import Dialogue, Row, Text
from edge_client.data.tokenize import Example, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PACKAGES = ("asyncio", "email", "xml", "multiprocessing", "http", "unittest", "logging", "urllib", "importlib", "json")
HELD_OUT = 128  # examples of each of validation and test
DRAWS = 20  # from a Dirichlet distribution
MIN_TARGETS = 16  # of an example: rests of a text, and answers after prompts that fill the window, are left out


@dataclass(frozen=True)
class Task:
    """Labelled rows, the longest example taken of them in tokens, and what is done when nothing else is said."""

    rows: Callable[[], Iterator[tuple[str, Row]]]
    max_seq_len: int
    dealt: str = "groups"  # or "random"
    examples: int = 480  # to train on, of all clients
    epochs: float = 5.0
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Federation:
    """Examples by client, and everybody's held-out ones."""

    train: tuple[tuple[Example, ...], ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]


def _stdlib() -> Iterator[tuple[str, Row]]:
    for package in PACKAGES:
        for row in sorted(set(stdlib_packages.rows(package))):
            yield package, Text(package, row)


def _shakespeare() -> Iterator[tuple[str, Row]]:
    """The ten speakers with the most text; a row is a speech of some length."""
    text = (DATA / "tinyshakespeare" / "input.txt").read_text("utf-8")
    speeches: dict[str, list[str]] = {}
    for block in re.split(r"\n\n+", text):
        speaker, _, speech = block.partition(":\n")
        if len(speech) >= 60:
            speeches.setdefault(speaker, []).append(block)
    for speaker in sorted(speeches, key=lambda name: -sum(map(len, speeches[name])))[:10]:
        for speech in speeches[speaker]:
            yield speaker, Text(speaker, speech)


def _gsm8k() -> Iterator[tuple[str, Row]]:
    for line in (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        yield "", _pair(row["question"] + "\n", row["answer"])


def _dolly() -> Iterator[tuple[str, Row]]:
    for file in sorted((DATA / "dolly15k_fed10").glob("local_training_*.json")):
        for row in json.loads(file.read_text("utf-8")):
            question = f"{row['instruction']}\n{row['context']}".strip() + "\n"
            yield row["category"], _pair(question, row["response"])


def _pair(prompt: str, answer: str) -> Row:
    return Dialogue("", (), plain=(prompt, answer))


# Near to what the bases were pretrained on, many passes over few examples only overfit: there, more examples and fewer
# passes. The number of steps is the same everywhere: 60 for each of ten clients.
TASKS = {
    "stdlib, random": Task(_stdlib, 64, "random", examples=1200, epochs=2.0, learning_rate=1e-3),
    "stdlib, by package": Task(_stdlib, 64, examples=1200, epochs=2.0, learning_rate=1e-3),
    "shakespeare, by speaker": Task(_shakespeare, 64),
    "gsm8k": Task(_gsm8k, 144, "random"),
    "dolly, by category": Task(_dolly, 96),
}


def available(name: str) -> bool:
    """Whether the task's data is on this machine."""
    return name.startswith("stdlib") or DATA.exists()


def federation(
    name: str, tokenizer: Tokenizer, *, clients: int, examples: int, seed: int, dealt: str | float | None = None
) -> Federation:
    """So many training examples in all, of equal length at most, dealt to so many clients.

    `dealt`: "random"; "groups", where the examples are laid in the order of their labels and cut in equal parts, so
    that ten clients of ten labels have one each; or α, where each label is cut by shares drawn from a symmetric
    Dirichlet distribution (Yurochkin et al., arXiv 1905.12022), so that clients differ in size too, ∞ being "random".
    None: as the task says.

    Raises:
        ValueError: the task has too few examples.
    """
    pool, valid, test = _examples(name, tokenizer)
    rng = np.random.default_rng([seed, 7])
    labels = sorted({label for label, _ in pool})
    by_label = {label: [one for had, one in pool if had == label] for label in labels}
    for found in by_label.values():
        rng.shuffle(found)  # type: ignore[arg-type]
    taken = _evenly({label: len(found) for label, found in by_label.items()}, examples)
    stock = {label: by_label[label][:count] for label, count in taken.items()}
    dealt = TASKS[name].dealt if dealt is None else dealt
    return Federation(tuple(map(tuple, deal(stock, clients, dealt, rng))), valid, test)


def deal(
    stock: dict[str, list[Example]], clients: int, dealt: str | float, rng: np.random.Generator
) -> list[list[Example]]:
    """Everything in stock, by label, among so many clients; but for α as evenly as can be."""
    if dealt == "groups":
        laid = [one for label in stock for one in stock[label]]
    elif dealt == "random" or dealt == float("inf"):
        laid = [one for label in stock for one in stock[label]]
        laid = [laid[i] for i in rng.permutation(len(laid))]
    else:
        return _dirichlet(stock, clients, float(dealt), rng)
    cuts = np.linspace(0, len(laid), clients + 1).round().astype(int)
    return [laid[start:end] for start, end in pairwise(cuts)]


def _dirichlet(
    stock: dict[str, list[Example]], clients: int, alpha: float, rng: np.random.Generator
) -> list[list[Example]]:
    """Each label's examples by shares of their own; of many draws the one whose smallest client has most."""
    draws = (rng.dirichlet([alpha] * clients, len(stock)) for _ in range(DRAWS))
    sizes = np.array([len(found) for found in stock.values()])
    shares = max(draws, key=lambda draw: float((sizes @ draw).min()))
    dealt: list[list[Example]] = [[] for _ in range(clients)]
    for found, share in zip(stock.values(), shares, strict=True):
        cuts = [0, *(np.cumsum(share) * len(found)).round().astype(int)]
        for hand, (start, end) in zip(dealt, pairwise(cuts), strict=True):
            hand += found[start:end]
    while not min(map(len, dealt)) and max(map(len, dealt)) > 1:
        min(dealt, key=len).append(max(dealt, key=len).pop())
    return dealt


def _evenly(there: dict[str, int], wanted: int) -> dict[str, int]:
    """So many in all, from each label the same number as far as it has them."""
    if sum(there.values()) < wanted:
        raise ValueError(f"{wanted} examples were asked for and there are {sum(there.values())}")
    taken = dict.fromkeys(there, 0)
    while (rest := wanted - sum(taken.values())) > 0:
        open_ = [label for label in there if taken[label] < there[label]]
        for at, label in enumerate(open_):
            share = rest // len(open_) + (at < rest % len(open_))
            taken[label] += min(share, there[label] - taken[label])
    return taken


_Labelled = Sequence[tuple[str, Example]]


@lru_cache(maxsize=8)
def _examples(name: str, tokenizer: Tokenizer) -> tuple[_Labelled, tuple[Example, ...], tuple[Example, ...]]:
    """A task's examples: to train on, with their labels; validation; test. Rows fall on one side whole.

    Of every label the same number is held out, so that a test set is everybody's; of one that has few, less.
    """
    task, rng = TASKS[name], np.random.default_rng(20_241)
    by_label: dict[str, list[list[Example]]] = {}
    for label, row in task.rows():
        found = tokenise([row], tokenizer, task.max_seq_len).examples
        if enough := [one for one in found if one.num_targets >= MIN_TARGETS]:
            by_label.setdefault(label, []).append(enough)
    sides: dict[str, list[Example]] = {"valid": [], "test": []}
    pool: list[tuple[str, Example]] = []
    for label, rows in by_label.items():
        order = [rows[i] for i in rng.permutation(len(rows))]
        for held_out in sides.values():
            mine: list[Example] = []
            rest = len(order) - len(rows) // 4
            while len(mine) < -(-HELD_OUT // len(by_label)) and len(order) > rest:
                mine += order.pop()
            held_out += mine[: -(-HELD_OUT // len(by_label))]
        pool += [(label, one) for row in order for one in row]
    return pool, tuple(sides["valid"]), tuple(sides["test"])
