"""Did federation help here: the base, this machine's own adapter and the published model on the rows that this machine
held out. llama.cpp measures all three on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters import adapter, architectures
from converters.families import NotKnownHere
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from edge_client.data.tokenize import Example
from edge_client.outbox import DataSource
from edge_client.results import llama_process
from edge_client.results.llama_model import Loss
from edge_client.tasks import language_modelling
from oneround.errors import BadData, BadModel
from oneround.v1 import federation_pb2 as pb

MODELS = ("base", "own", "published")
CLEAR = 2.0  # standard errors

Nats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Of two models' losses on the same examples, in nats per token; below zero the first is better."""

    mean: float
    error: float  # standard error; infinite with a single example

    @property
    def sign(self) -> int:
        """-1: clearly better, 1: clearly worse, 0: it could be chance."""
        return 0 if abs(self.mean) <= CLEAR * self.error else int(math.copysign(1, self.mean))


@dataclass(frozen=True)
class Scores:
    """What was measured: nats of each example by each of MODELS, and the examples' target tokens."""

    nats: Mapping[str, Nats]  # (examples,) each
    tokens: NDArray[np.int64]  # (examples,)

    def loss(self, model: str) -> Loss:
        """A model's loss over all examples."""
        count = int(self.tokens.sum())
        return Loss(float(self.nats[model].sum()) / count, count)

    def difference(self, model: str, other: str) -> Difference:
        """How far a model's loss is from another's. Examples are taken as drawn at random, tokens of one as dependent:
        the standard error is that of a ratio of sums."""
        apart_by = self.nats[model] - self.nats[other]
        count, number = float(self.tokens.sum()), len(self.tokens)
        mean = float(apart_by.sum()) / count
        if number < 2:
            return Difference(mean, math.inf)
        rest = apart_by - mean * self.tokens
        return Difference(mean, math.sqrt(number / (number - 1) * float(rest @ rest)) / count)

    @property
    def helped(self) -> bool | None:
        """Whether the published model is better here than what this machine has without the others; None: not clear."""
        to_base, to_own = (self.difference("published", other).sign for other in ("base", "own"))
        if 1 in (to_base, to_own):
            return False
        return True if to_own == to_base == -1 else None

    @property
    def sentence(self) -> str:
        """Did federation help here?"""
        to_base, to_own = (self.difference("published", other) for other in ("base", "own"))
        parts = (
            f"{_than(to_base)} the base",
            f"{_than(to_own)} this machine's own adapter",
        )
        if self.helped:
            end = "federation helped here"
        elif self.helped is None:
            end = "whether federation helped here is not clear"
        elif to_base.sign == 1:
            end = "federation did not help here"
        else:
            end = "on its own kind of data this machine does better alone"
        return f"The published model is {parts[0]}, and {parts[1]}: {end}."

    def report(self, version: int) -> pb.Evaluation:
        """What a coordinator may be told: five numbers."""
        losses = {f"{model}_loss": self.loss(model).per_token for model in MODELS}
        return pb.Evaluation(version=version, tokens=int(self.tokens.sum()), **losses)


def _than(difference: Difference) -> str:
    if difference.sign == 0:
        return f"not clearly different ({difference.mean:+.3f} nats per token) from"
    return f"{'better' if difference.sign < 0 else 'worse'} by {abs(difference.mean):.3f} nats per token than"


def held_out(source: DataSource, base: Path, max_seq_len: int, most_tokens: int) -> list[Example]:
    """The rows that training holds out, tokenised as in training; the same ones whenever it is asked.

    Where they have more than `most_tokens` target tokens (0: no limit), whole examples drawn with a fixed seed.

    Raises:
        BadData: there is no such data, or nothing to measure on in it.
    """
    skip, spec = source.skip_bad_rows, pb.JobSpec(train=pb.TrainSpec(max_seq_len=max_seq_len))
    rows = language_modelling.load(Path(source.data), skip_bad_rows=skip).held_out
    examples = language_modelling.prepare(rows, base, spec, skip_bad_rows=skip).examples
    chosen = drawn([example.num_targets for example in examples], most_tokens)
    if not chosen:
        raise BadData(f"nothing is held out of {source.data} that could be measured on", hint="--data FILE_OR_FOLDER")
    return [examples[index] for index in chosen]


def drawn(tokens: Sequence[int], most: int) -> list[int]:
    """Which examples to take, in order, for about so many tokens in all; `most` = 0 takes all that have any."""
    some = [index for index, count in enumerate(tokens) if count]
    if not most or sum(tokens) <= most:
        return some
    taken, total = [], 0
    for index in np.random.default_rng(0).permutation(some).tolist():
        if total >= most:
            break
        taken.append(index)
        total += tokens[index]
    return sorted(taken)


def as_gguf(base: Path, kept: Path, given: Path | None) -> Path:
    """The base as a GGUF: the given one, or one that is built from the base's folder, once.

    Raises:
        BadModel: it cannot be built, since the model's family is not known here.
    """
    if given is not None:
        return given
    if not kept.exists():
        try:
            gguf_base.build(base, kept)
        except NotKnownHere as error:
            raise BadModel(str(error), hint="--base-gguf FILE, with a GGUF of the base") from error
    return kept


def own_adapter(trained: Path, base: Path, base_gguf: Path, to: Path, initial: Path | None = None) -> Path:
    """This machine's adapter as a GGUF adapter for the base. `initial` has its A, where that was frozen."""
    frozen = adapter.read(initial) if initial else None
    gguf_adapter.write(adapter.read(trained, frozen), to, architectures.describe(base, base_gguf))
    return to


def measure(
    files: Mapping[str, tuple[Path, Path | None]], examples: Sequence[Example], on_tokens: Callable[[str, int], None]
) -> Scores:
    """Have llama.cpp measure each of MODELS, a GGUF and perhaps an adapter, each in a process of its own.

    `on_tokens` is called with a model and how many target tokens of all models together are done.
    """
    tokens = np.array([example.num_targets for example in examples], np.int64)
    nats: dict[str, Nats] = {}
    for number, model in enumerate(MODELS):
        before = number * int(tokens.sum())

        def done(count: int, model: str = model, before: int = before) -> None:
            on_tokens(model, before + count)

        nats[model] = np.array(llama_process.losses(*files[model], examples, done))
    return Scores(nats, tokens)
