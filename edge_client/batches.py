"""Examples → integer arrays: which examples make up which step, the same for every backend.

Deterministic in (examples, seed), with random access by step, so that training can go on from any step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.errors import BadData
from edge_client.examples import Example

# Batches that are sorted by length together: enough for little padding, few enough to keep epochs different.
_BUCKET = 64


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees; B examples, padded on the right with zeros to the longest, T + 1 tokens.

    Attention is causal, so nothing looks at padding and no attention mask is needed.
    """

    inputs: NDArray[np.int32]  # (B, T)
    labels: NDArray[np.int32]  # (B, T): inputs, one token on
    mask: NDArray[np.bool_]  # (B, T): which labels are targets

    @property
    def num_targets(self) -> int:
        """Target tokens; the loss is their mean."""
        return int(self.mask.sum())

    @property
    def targets(self) -> NDArray[np.int64]:
        """Where the targets stand in the flattened (B·T) labels."""
        return np.flatnonzero(self.mask)


class Batches:
    """The batches of a whole training run, by step from 0; the same in any order and after a restart.

    Raises:
        BadData: there is no example with a target.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, epochs: float, seed: int) -> None:
        if not any(example.num_targets for example in examples):
            raise BadData(
                "no example has a token to learn from",
                hint="is max_seq_len of the job too small for the prompts in the data?",
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(examples) / batch_size)
        self.total_steps = max(1, round(epochs * self.steps_per_epoch))
        self._lengths = np.array([len(example.ids) for example in examples])
        self._epoch, self._order = 0, self._ordered(0)

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def num_targets(self) -> int:
        """Target tokens of one epoch."""
        return sum(example.num_targets for example in self.examples)

    def batch(self, step: int) -> Batch:
        """The batch of a step, 0 ≤ step < total_steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        return padded([self.examples[i] for i in self._order[place]])

    def _ordered(self, epoch: int) -> list[NDArray[np.int64]]:
        """Which examples make up each step of an epoch: every example once, the last short batch kept."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.examples))
        bucket = _BUCKET * self.batch_size
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(shuffled), bucket):
            members = shuffled[start : start + bucket]
            by_length = members[np.argsort(self._lengths[members], kind="stable")]
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def padded(examples: Sequence[Example]) -> Batch:
    """Examples as one rectangle, as long as the longest of them."""
    length = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), length), dtype=np.int32)
    is_target = np.zeros((len(examples), length), dtype=np.bool_)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        is_target[row, : len(example.ids)] = example.is_target
    return Batch(ids[:, :-1], ids[:, 1:], is_target[:, 1:])
