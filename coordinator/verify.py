"""Whether a merged file says what base + adapter says. Only files that pass are released.

llama.cpp judges, in a child process (`python -m coordinator.verify`), since it may abort on a bad file. The probe is
text that base + adapter itself writes: in the distribution that the model is for, whatever its language.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters import gguf_file, llama
from converters.errors import BadModel
from converters.llama import Logits

if TYPE_CHECKING:
    from llama_cpp import Llama

PROBE_TOKENS = 128

# How far a float file's logits may be from base + adapter at any probe position, in units of the reference logits'
# standard deviation: f32 differs by summation order alone; with f16 and bf16 weights llama.cpp also rounds what it
# multiplies them by. The coarser of the file's and the base's type counts.
LOGIT_BOUND = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1}
# Mean Kullback-Leibler divergence, in nats per token, from base + adapter to a quantised file.
DIVERGENCE_BOUND = {"q8_0": 0.02, "q6_k": 0.05, "q5_k_m": 0.1, "q4_k_m": 0.25}


@dataclass(frozen=True)
class Reference:
    """What base + adapter says to the probe."""

    kind: str  # the base's type: f32, f16 or bf16
    ids: list[int]
    logits: Logits  # (probe, vocab)


@dataclass(frozen=True)
class Verdict:
    """How far a file is from base + adapter, and the bound that it was held to."""

    measure: str  # "max_logit_difference" (in standard deviations) or "mean_divergence" (nats per token)
    value: float
    bound: float
    top1_agreement: float  # share of probe positions where the most likely token is the same

    @property
    def passed(self) -> bool:
        return self.value <= self.bound

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}


def reference(base: Path, adapter: Path) -> Reference:
    """Let base + adapter write the probe, and keep its logits."""
    ids, scores = _in_child(base, adapter, None)
    types = {tensor.info.type for tensor in gguf_file.read(base).tensors.values()}
    coarsest = [kind for kind, known in gguf_file.FLOATS.items() if known.type in types][-1]
    return Reference(coarsest, ids, scores)


def verify(merged: Path, kind: str, against: Reference) -> Verdict:
    """Hold a merged file of a type (`f16`, `q8_0`, …) against the reference.

    Raises:
        BadModel: llama.cpp does not load or run it.
    """
    _, scores = _in_child(merged, None, against.ids)
    agreement = float((scores.argmax(-1) == against.logits.argmax(-1)).mean())
    if kind in LOGIT_BOUND:
        # A softmax does not see a constant that is added to all logits, so neither does this.
        difference = _centred(scores) - _centred(against.logits)
        value = float(np.abs(difference).max() / _centred(against.logits).std())
        return Verdict("max_logit_difference", value, max(LOGIT_BOUND[kind], LOGIT_BOUND[against.kind]), agreement)
    expected, found = llama.log_softmax(against.logits), llama.log_softmax(scores)
    value = float((np.exp(expected) * (expected - found)).sum(-1).mean())
    return Verdict("mean_divergence", value, DIVERGENCE_BOUND[kind], agreement)


def _centred(scores: Logits) -> Logits:
    centred: Logits = scores - scores.mean(-1, keepdims=True)
    return centred


def _in_child(model: Path, adapter: Path | None, ids: list[int] | None) -> tuple[list[int], Logits]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npz"
        request = {"model": str(model), "adapter": str(adapter) if adapter else None, "ids": ids, "out": str(out)}
        child = subprocess.run(
            [sys.executable, "-m", "coordinator.verify"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0 or not out.exists():
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise BadModel(f"llama.cpp failed on {model.name} (exit {child.returncode}): {last}")
        with np.load(out) as found:
            return found["ids"].tolist(), found["logits"]


def _child() -> None:
    request = json.loads(sys.stdin.read())
    adapter = Path(request["adapter"]) if request["adapter"] else None
    model = llama.load(Path(request["model"]), adapter=adapter, context=2 * PROBE_TOKENS)
    ids = request["ids"] or _written_by(model)
    np.savez(request["out"], ids=ids, logits=llama.logits(model, ids))


def _written_by(model: Llama) -> list[int]:
    """PROBE_TOKENS ids, sampled from the model with a fixed seed."""
    rng = np.random.default_rng(0)
    ids = [max(model.token_bos(), 0)]
    while len(ids) < PROBE_TOKENS:
        model.eval(ids[-1:])
        chances = np.exp(llama.log_softmax(np.array(model.scores[len(ids) - 1], np.float32)).astype(np.float64))
        ids.append(int(rng.choice(len(chances), p=chances / chances.sum())))
    return ids


if __name__ == "__main__":
    _child()
