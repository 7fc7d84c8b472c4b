"""Losses of several models on the same examples, and whether they differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_client.results.llama_model import Loss
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
