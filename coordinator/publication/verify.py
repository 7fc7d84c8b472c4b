"""Whether a merged file says what base + adapter says. Only files that pass are released.

llama.cpp judges, in a child process (`python -m coordinator.publication.verify`), since it may abort on a bad file.
The probe is text that base + adapter itself writes: in the distribution that the model is for, whatever its language.
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
from gguf import GGML_QUANT_SIZES

from converters import llama
from converters.gguf import file as gguf_file
from converters.llama import Logits
from oneround.errors import BadModel

if TYPE_CHECKING:
    from llama_cpp import Llama

PROBE_TOKENS = 128

# How far a float file's logits may be from base + adapter at any probe position, ‖difference‖ / ‖logits‖. f32 differs
# by summation order alone; f16 and bf16 round every weight, and llama.cpp rounds what it multiplies them by, the more
# the deeper the model: 0.0075 with 4 layers in bf16, 0.022 with 22. The coarser of the file's and the base's counts.
LOGIT_BOUND = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2}
# Mean Kullback-Leibler divergence, in nats per token, from a float file to a quantised one; and from a quantised base
# with its adapter to a float file, where llama.cpp rounds what it multiplies the base's weights by.
DIVERGENCE_BOUND = {"q8_0": 0.02, "q6_k": 0.05, "q5_k_m": 0.1, "q4_k_m": 0.25}
_COARSEST = "q4_k_m"  # what a quantised base of any other type is held to


@dataclass(frozen=True)
class ModelOutput:
    """What a model says to the probe."""

    kind: str  # f32, f16, bf16, or a quantised type
    ids: list[int]
    logits: Logits  # (probe, vocab)

    @property
    def perplexity(self) -> float:
        """Of the probe: e to the mean negative log-likelihood of each next token."""
        chances = np.take_along_axis(llama.log_softmax(self.logits[:-1]), np.array(self.ids[1:])[:, None], axis=-1)
        return float(np.exp(-chances.astype(np.float64).mean()))


@dataclass(frozen=True)
class FileCheck:
    """How far a file is from what it should say, and the bound that it was held to."""

    measure: str  # "relative_logit_difference" or "mean_divergence" (nats per token)
    value: float
    bound: float
    against: str  # "base + adapter", or the type of the float file
    top1_agreement: float  # share of probe positions where the most likely token is the same
    perplexity: float
    perplexity_against: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound

    @property
    def sentence(self) -> str:
        return f"{self.measure.replace('_', ' ')} from {self.against} is {self.value:.3g}, over {self.bound:g}"

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Verification:
    """What llama.cpp found."""

    verdicts: dict[str, FileCheck]  # by file that may be released
    withheld: dict[str, str]  # by file that may not, the reason
    adapter_effect: float  # how far base + adapter is from the base alone, in the measure that float files are held to


def base_and_adapter(base: Path, adapter: Path) -> ModelOutput:
    """Let base + adapter write the probe, and keep its logits.

    Raises:
        BadModel: llama.cpp does not load or run them.
    """
    ids, scores = _in_child(base, adapter, None)
    return ModelOutput(_kind(base), ids, scores)


def alone(file: Path, kind: str, ids: list[int]) -> ModelOutput:
    """What a file of a type (`f16`, `q8_0`, …) says to the probe.

    Raises:
        BadModel: llama.cpp does not load or run it.
    """
    _, scores = _in_child(file, None, ids)
    return ModelOutput(kind, ids, scores)


def verdict(said: ModelOutput, against: ModelOutput, adapter_effect: float = 0.0) -> FileCheck:
    """Hold a file against base + adapter (a float file) or against the float file that it was made from.

    Where the adapter moves the base by more than the bound, a float file has to be clearly nearer than the base is, so
    that one without the adapter never passes.
    """
    agreement = float((said.logits.argmax(-1) == against.logits.argmax(-1)).mean())
    quantised = [kind for kind in (said.kind, against.kind) if kind not in LOGIT_BOUND]
    if quantised:
        expected, found = llama.log_softmax(against.logits), llama.log_softmax(said.logits)
        value = float((np.exp(expected) * (expected - found)).sum(-1).mean())
        measure, bound = "mean_divergence", DIVERGENCE_BOUND[quantised[0]]
    else:
        value = difference(said.logits, against.logits)
        measure, bound = "relative_logit_difference", max(LOGIT_BOUND[said.kind], LOGIT_BOUND[against.kind])
        bound = min(bound, 0.8 * adapter_effect) if adapter_effect > bound else bound
    name = against.kind if said.kind in DIVERGENCE_BOUND else "base + adapter"
    return FileCheck(measure, value, bound, name, agreement, said.perplexity, against.perplexity)


def _kind(base: Path) -> str:
    """The coarsest type among a file's tensors, by our names."""
    types = {tensor.info.type for tensor in gguf_file.read(base).tensors.values()}
    floats = [kind for kind, known in gguf_file.FLOATS.items() if known.type in types]
    quantised = {kind.name for kind in types if GGML_QUANT_SIZES[kind][0] > 1}
    if quantised:
        return "q8_0" if quantised == {"Q8_0"} else _COARSEST
    return floats[-1]


def difference(found: Logits, expected: Logits) -> float:
    """The largest over positions of ‖found − expected‖ / ‖expected‖. A softmax does not see a constant that is added to
    all logits of a position, so neither does this."""
    found, expected = found - found.mean(-1, keepdims=True), expected - expected.mean(-1, keepdims=True)
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def _in_child(model: Path, adapter: Path | None, ids: list[int] | None) -> tuple[list[int], Logits]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npz"
        request = {"model": str(model), "adapter": str(adapter) if adapter else None, "ids": ids, "out": str(out)}
        child = subprocess.run(
            [sys.executable, "-m", "coordinator.publication.verify"],
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
