"""How far what a merged file says is from what base + adapter says.

llama.cpp judges, in a child process (`python -m coordinator.publication.verify`), since it may abort on a bad file.
The probe is text that base + adapter itself writes: in the distribution that the model is for, whatever its language.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES

from converters import llama
from converters.gguf import file as gguf_file
from converters.gguf.types import COARSEST_QUANTISED, FINEST_QUANTISED, FLOATS, QUANTISED
from converters.llama import Logits
from oneround.errors import BadModel
from oneround.manifest import FileCheck

if TYPE_CHECKING:
    from llama_cpp import Llama

PROBE_TOKENS = 128


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


def verdict(output: ModelOutput, against: ModelOutput, adapter_effect: float = 0.0) -> FileCheck:
    """Hold a file against base + adapter (a float file) or against the float file that it was made from.

    The coarser type of the two has the bound. Where the adapter moves the base by more than the bound, a float file has
    to be clearly nearer than the base is, so that one without the adapter never passes.
    """
    quantised = [kind for kind in (output.kind, against.kind) if kind in QUANTISED]
    if quantised:
        expected, actual = llama.log_softmax(against.logits), llama.log_softmax(output.logits)
        value = float((np.exp(expected) * (expected - actual)).sum(-1).mean())
        measure, bound = "mean_divergence", QUANTISED[quantised[0]].divergence_bound
    else:
        value = difference(output.logits, against.logits)
        measure = "relative_logit_difference"
        bound = max(FLOATS[output.kind].logit_bound, FLOATS[against.kind].logit_bound)
        bound = min(bound, 0.8 * adapter_effect) if adapter_effect > bound else bound
    return FileCheck(
        measure=measure,
        value=value,
        bound=bound,
        against=against.kind if output.kind in QUANTISED else "base + adapter",
        top1_agreement=float((output.logits.argmax(-1) == against.logits.argmax(-1)).mean()),
        perplexity=output.perplexity,
        perplexity_against=against.perplexity,
        passed=value <= bound,
    )


def _kind(base: Path) -> str:
    """The coarsest type among a file's tensors, by our names; any mixture of quantised ones counts as the coarsest."""
    types = {tensor.info.type for tensor in gguf_file.read(base).tensors.values()}
    quantised = {tensor_type for tensor_type in types if GGML_QUANT_SIZES[tensor_type][0] > 1}
    if quantised:
        only_finest = quantised == {QUANTISED[FINEST_QUANTISED].type}
        return FINEST_QUANTISED if only_finest else COARSEST_QUANTISED
    return [name for name, float_type in FLOATS.items() if float_type.type in types][-1]


def difference(actual: Logits, expected: Logits) -> float:
    """The largest over positions of ‖actual − expected‖ / ‖expected‖. A softmax does not see a constant that is added
    to all logits of a position, so neither does this."""
    actual, expected = actual - actual.mean(-1, keepdims=True), expected - expected.mean(-1, keepdims=True)
    return float((np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


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
        with np.load(out) as answer:
            return answer["ids"].tolist(), answer["logits"]


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
