"""Examples → integer arrays: which examples make up which step, the same for every backend.

Deterministic in (examples, seed), with random access by step, so that training can go on from any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.data.tokenize import Example
from oneround.errors import BadData

# Batches that are sorted by length together: enough for little padding, few enough to keep epochs different.
_BUCKET = 64
NEXT_TOKEN = "next-token"  # a loss: cross-entropy of the next token, at the targets


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees; B examples, padded on the right with zeros to the longest, T + 1 tokens.

    Attention is causal, so nothing looks at padding and no attention mask is needed.
    """

    inputs: NDArray[np.int32]  # (B, T)
    labels: NDArray[np.int32]  # (B, T): inputs, one token on
    mask: NDArray[np.bool_]  # (B, T): which labels are targets

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return len(self.inputs)

    @property
    def num_targets(self) -> int:
        """Target tokens; the loss is their mean."""
        return int(self.mask.sum())

    @property
    def targets(self) -> NDArray[np.int64]:
        """Where the targets stand in the flattened (B·T) labels."""
        return np.flatnonzero(self.mask)

    @property
    def targeted(self) -> NDArray[np.int32]:
        """The labels that are targets (targets,)."""
        return self.labels[self.mask]

    def split(self, parts: int) -> list[Batch]:
        """The same examples in at most so many smaller batches that hold a target, each as long as its own longest."""
        pieces = []
        for rows in np.array_split(np.arange(len(self.inputs)), min(parts, len(self.inputs))):
            mask = self.mask[rows]
            if mask.any():
                # Nothing after a row's last target has a say in the loss.
                length = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
                pieces.append(Batch(self.inputs[rows, :length], self.labels[rows, :length], mask[:, :length]))
        return pieces


class Batches:
    """The batches of a whole training run, by step from 0; the same in any order and after a restart.

    A step takes `batch_size` examples; with `room` > 0 it takes as many as fit into so many tokens, counted as padded,
    which is what packing is for: every example stays whole and by itself.

    Raises:
        BadData: there is no example with a target.
    """

    loss = NEXT_TOKEN

    def __init__(
        self, examples: Sequence[Example], batch_size: int, epochs: float, seed: int, *, room: int = 0
    ) -> None:
        if not any(example.num_targets for example in examples):
            raise BadData(
                "no example has a token to learn from",
                hint="is max_seq_len of the job too small for the prompts in the data?",
            )
        self.examples = examples
        self.batch_size = batch_size
        self.room = room
        self.seed = seed
        self._lengths = np.array([len(example.ids) for example in examples])
        self._epoch, self._order = 0, self._ordered(0)
        self.steps_per_epoch = len(self._order)
        self.total_steps = max(1, round(epochs * self.steps_per_epoch))

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def num_targets(self) -> int:
        """Target tokens of one epoch."""
        return sum(example.num_targets for example in self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = self._lengths.tolist()
        return lengths

    @property
    def settings(self) -> tuple[int, int, int]:
        """What decides, beside the examples, what is in each batch."""
        return self.batch_size, self.room, self.seed

    def content(self) -> Iterator[NDArray[Any]]:
        """Token ids and targets of every example, in order."""
        for example in self.examples:
            yield np.asarray(example.ids)
            yield np.asarray(example.is_target)

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
        # With room, all at once: where they are cut hangs on their lengths alone then, so epochs have the same steps.
        bucket = len(shuffled) if self.room else _BUCKET * self.batch_size
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(shuffled), bucket):
            members = shuffled[start : start + bucket]
            by_length = members[np.argsort(self._lengths[members], kind="stable")]
            batches += self._filled(by_length) if self.room else self._counted(by_length)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _counted(self, by_length: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]

    def _filled(self, by_length: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut where the rectangle of all that came since the last cut would be over the room."""
        cuts, start = [], 0
        for end, longest in enumerate(self._lengths[by_length], 1):
            if (end - start) * int(longest) > self.room and end - start > 1:
                start = end - 1
                cuts.append(start)
        return np.split(by_length, cuts)


def padded(examples: Sequence[Example]) -> Batch:
    """Examples as one rectangle, as long as the longest of them."""
    length = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), length), dtype=np.int32)
    is_target = np.zeros((len(examples), length), dtype=np.bool_)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        is_target[row, : len(example.ids)] = example.is_target
    return Batch(ids[:, :-1], ids[:, 1:], is_target[:, 1:])
