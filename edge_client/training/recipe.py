"""The optimizer's settings and the schedule: one recipe that every backend follows, so that results agree; and the
setup by which a machine carries it out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from oneround.v1 import federation_pb2 as pb

# Share of the peak learning rate, by how much of the run after the warm-up is done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Recipe:
    """AdamW with bias correction and without weight decay, and gradients clipped by their global norm.

    What a job can choose comes from its spec, where the defaults stand; what it cannot stands here. The loss is the
    mean over the target tokens of a batch.
    """

    alpha: float
    dropout: float
    peak_learning_rate: float
    schedule: str
    warmup_steps: int
    total_steps: int
    seed: int
    freeze_a: bool = False  # only B is trained
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    @classmethod
    def from_spec(cls, spec: pb.JobSpec, total_steps: int) -> Recipe:
        """The recipe of a checked job, for a run of so many optimizer steps."""
        return cls(
            alpha=spec.lora.alpha,
            dropout=spec.lora.dropout,
            peak_learning_rate=spec.train.learning_rate,
            schedule=spec.train.schedule,
            warmup_steps=round(spec.train.warmup_ratio * total_steps),
            total_steps=total_steps,
            seed=spec.train.seed,
            freeze_a=spec.lora.freeze_a,
        )

    def scaling(self, rank: int) -> float:
        """ΔW = scaling · B A while training. The common layout has it folded into B."""
        return self.alpha / rank

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0.

        With w warm-up steps of n: peak·(step+1)/(w+1) before step w, so that step w is the first at the peak; from
        there the schedule over (step−w)/(n−w), which is below 1 at the last step n−1 and would be 1 after it. So no
        step is wasted on a rate of zero, and `linear` and `cosine` end at zero after the last step.
        """
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak_learning_rate * SCHEDULES[self.schedule](min(done, 1.0))

    def dropout_seed(self, step: int) -> int:
        """Seeds dropout anew at every step, so that a run that goes on from a checkpoint draws the same masks."""
        return (self.seed * 1_000_003 + step) % 2**63


PRECISIONS = ("float32", "bfloat16")
BITS = (0, 4, 8)


@dataclass(frozen=True)
class Setup:
    """How this machine carries a recipe out. It decides on rounding, memory and time, not on what is computed.

    The adapter, its gradients' sum and the optimizer are float32 in any case.
    """

    precision: str = "float32"  # of the base and of activations; one of PRECISIONS
    bits: int = 0  # that the weights of the base's linear layers are rounded to, one of BITS; 0: they are not
    parts: int = 1  # a batch is taken in so many, one after the other
    checkpointing: bool = False  # activations are not kept for the way back, but computed again

    @property
    def rounding(self) -> str:
        """What the base is rounded to; as for people, so in the digest of a run."""
        return f"{self.precision}, base in {self.bits} bits" if self.bits else self.precision

    def smaller(self, batch_size: int) -> Setup | None:
        """The next that needs less memory: parts of half the size; when they are single examples, checkpointing."""
        if self.parts < batch_size:
            return replace(self, parts=min(2 * self.parts, batch_size))
        return None if self.checkpointing else replace(self, checkpointing=True)


EXACT = Setup()
