"""Using a model on this machine, with llama.cpp: what does it say, and how well does it predict this data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from converters import llama
from oneround.errors import BadData, BadModel

if TYPE_CHECKING:
    from llama_cpp import Llama

    from edge_client.data.tokenize import Example


_ROWS = 64  # positions whose logits are looked at together


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood in nats per target token."""

    per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_token) if self.per_token < 700 else math.inf


def evaluate(model: Llama, examples: Sequence[Example]) -> Loss:
    """The model's loss on the target tokens of examples: what training minimises, on data it has not seen.

    Raises:
        BadData: there is no target token, or an example is longer than the model's context.
    """
    total, tokens = 0.0, 0
    for example in examples:
        total += nats(model, example)
        tokens += example.num_targets
    if not tokens:
        raise BadData("there is no target token to evaluate on")
    return Loss(total / tokens, tokens)


def nats(model: Llama, example: Example) -> float:
    """Negative log-likelihood of an example's target tokens together.

    Raises:
        BadData: the example is longer than the model's context.
        BadModel: the model says something that is no number.
    """
    if len(example.ids) > model.n_ctx() + 1:
        raise BadData(f"an example of {len(example.ids)} tokens is over the context of {model.n_ctx()}")
    targets = np.flatnonzero(example.is_target[1:])  # positions whose next token counts
    if not len(targets):
        return 0.0
    model.reset()
    model.eval(example.ids[:-1].tolist())
    total = 0.0
    for start in range(0, len(targets), _ROWS):  # all logits of a long example would be gigabytes
        some = targets[start : start + _ROWS]
        log_probabilities = llama.log_softmax(np.array(model.scores[some], np.float32))  # (≤ _ROWS, V)
        total -= float(log_probabilities[np.arange(len(some)), example.ids[some + 1]].sum(dtype=np.float64))
    if not math.isfinite(total):
        raise BadModel("the model's logits are not finite numbers")
    return total


def complete(model: Llama, prompt: str, *, max_tokens: int = 128, temperature: float = 0.0) -> Iterator[str]:
    """The model's continuation of a text, in pieces.

    Raises:
        BadData: the text is longer than the model's context.
    """
    with _fitting(model):
        for piece in model.create_completion(prompt, max_tokens=max_tokens, temperature=temperature, stream=True):
            yield piece["choices"][0]["text"]


def reply(model: Llama, messages: list[dict[str, str]], *, max_tokens: int, temperature: float) -> Iterator[str]:
    """The model's next turn in a conversation, by its own chat template, in pieces.

    Raises:
        BadData: the conversation is longer than the model's context.
    """
    with _fitting(model):
        options = {"max_tokens": max_tokens, "temperature": temperature, "stream": True}
        for piece in model.create_chat_completion(messages, **options):
            yield piece["choices"][0]["delta"].get("content") or ""


@contextmanager
def _fitting(model: Llama) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # llama-cpp-python has no error of its own for it
        raise BadData(f"this does not fit into the model's context of {model.n_ctx()} tokens: {error}") from error


def has_chat_template(model: Llama) -> bool:
    """Whether the file says how a conversation is written; if not, text is simply continued."""
    return "tokenizer.chat_template" in model.metadata
