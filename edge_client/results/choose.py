"""Which of a publication's models is the best one for this machine's memory.

To run, a model takes its file, which llama.cpp maps, and room for keys, values and what is worked out in between. That
grows with the model's width, depth and vocabulary and not with how its weights are rounded, and cannot be known before
the file is here: a quarter of the file and 256 MiB are taken for it. Worked out from their shapes, that is enough for
4,096 tokens of SmolLM2-135M, Qwen2.5-0.5B, TinyLlama and Llama-3-8B, in q4_k_m too; for Gemma-2-9B it is a tenth short.

A model fits comfortably when that is at most half of the machine's memory: the other half is for the system and for
what else is open. All of it, and not what happens to be free: the same machine takes the same file every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import psutil

from oneround.v1 import federation_pb2 as pb

_WORKING = 256 * 2**20


class Memory(NamedTuple):
    """Of a machine, in bytes."""

    total: int
    available: int


class Fit(StrEnum):
    """How a model sits in memory."""

    COMFORTABLE = "comfortable"
    FULL = "full"  # comfortable, once something else is closed
    TIGHT = "tight"  # it takes more than half of all memory
    TOO_LARGE = "too_large"  # it takes more than there is


@dataclass(frozen=True)
class Choice:
    """A model, and why this one."""

    artifact: pb.Artifact
    needs: int  # bytes
    memory: Memory
    fit: Fit
    others: int  # merged models that were not taken

    @property
    def reason(self) -> str:
        """In a sentence's middle."""
        if not self.others:
            return "the only merged model"
        if self.fit in (Fit.COMFORTABLE, Fit.FULL):
            return "the most precise merged model that fits comfortably"
        return "the smallest merged model"


def this_machine() -> Memory:
    """Its memory now."""
    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.available)


def needed(size: int) -> int:
    """Bytes of memory that a model file of so many bytes takes to run, about."""
    return size + size // 4 + _WORKING


def fit(needs: int, memory: Memory) -> Fit:
    """How a model that needs so many bytes sits in a machine's memory."""
    if needs > memory.total:
        return Fit.TOO_LARGE
    if needs > memory.total // 2:
        return Fit.TIGHT
    return Fit.FULL if needs > memory.available else Fit.COMFORTABLE


def choose(merged: Sequence[pb.Artifact], memory: Memory) -> Choice:
    """The most precise model, which is the largest file, that fits comfortably; the smallest if none does.

    Of two of one size, f16 comes before bf16, which fewer processors calculate with.
    """
    by_size = sorted(merged, key=lambda artifact: (artifact.size, artifact.name))
    comfortable = [
        artifact for artifact in by_size if fit(needed(artifact.size), memory) in (Fit.COMFORTABLE, Fit.FULL)
    ]
    chosen = comfortable[-1] if comfortable else by_size[0]
    needs = needed(chosen.size)
    return Choice(chosen, needs, memory, fit(needs, memory), others=len(by_size) - 1)


def merged(artifacts: Sequence[pb.Artifact]) -> list[pb.Artifact]:
    """Those artifacts that are whole models."""
    return [artifact for artifact in artifacts if artifact.name.endswith(".gguf") and artifact.name != "adapter.gguf"]
