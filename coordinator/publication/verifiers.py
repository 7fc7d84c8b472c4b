"""What proves the parts of a publication: for each exporter a verifier. Only parts that pass are released.

A verifier finds how far a part is from what it should be, and the bound. Where a part fails nothing is published, but
for parts whose verifier withholds: those are moved aside, with the reason, and the others are published.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from converters import mlx, peft
from converters.adapter import Adapter
from converters.gguf import adapter as gguf_adapter
from coordinator.publication import exporters, read_back, verify
from coordinator.publication.exporters import EXPORTERS
from coordinator.publication.parts import Material, Part, Report
from coordinator.publication.verify import ModelOutput
from oneround.errors import BadData, BadModel
from oneround.manifest import FileCheck, ReadBack


class Evidence:
    """What parts are held against. llama.cpp is asked once for each output, and only for what somebody needs."""

    def __init__(self, material: Material, parts: Sequence[Part]) -> None:
        self.material = material
        self._parts = parts
        self._outputs: dict[Path, ModelOutput] = {}

    @cached_property
    def reference(self) -> ModelOutput:
        """What base + adapter says, as llama.cpp applies the one to the other."""
        (adapter,) = (part for part in self._parts if part.exporter == exporters.gguf_adapter.NAME)
        return verify.base_and_adapter(self.material.base_gguf, adapter.path)

    @cached_property
    def adapter_effect(self) -> float:
        """How far base + adapter is from the base alone, in the measure that float files are held to."""
        alone = verify.alone(self.material.base_gguf, self.reference.kind, self.reference.ids)
        return verify.difference(alone.logits, self.reference.logits)

    @property
    def finest_float(self) -> ModelOutput:
        """What the file says that quantised ones are made from."""
        return self.output(next(part for part in self._parts if part.exporter == exporters.merged_gguf.NAME))

    def output(self, part: Part) -> ModelOutput:
        """What a float file says; kept, since others are held against it."""
        if part.path not in self._outputs:
            self._outputs[part.path] = verify.alone(part.path, part.kind, self.reference.ids)
        return self._outputs[part.path]


@dataclass(frozen=True)
class Verifier:
    """`check` raises BadData where a part cannot even be read. `stage`: what is being done, for the operator."""

    check: Callable[[Part, Evidence], FileCheck | ReadBack]
    stage: str
    withholds: bool = False


@dataclass
class Verification:
    """What was found of the parts that are released, by name; why others are withheld; and how far base + adapter is
    from the base alone."""

    findings: dict[str, FileCheck | ReadBack] = field(default_factory=dict)
    withheld: dict[str, str] = field(default_factory=dict)
    adapter_effect: float = 0.0

    @property
    def file_checks(self) -> dict[str, FileCheck]:
        return {name: finding for name, finding in self.findings.items() if isinstance(finding, FileCheck)}

    @property
    def read_back(self) -> dict[str, ReadBack]:
        return {name: finding for name, finding in self.findings.items() if isinstance(finding, ReadBack)}


def _reads_back(read: Callable[[Part, Evidence], Adapter]) -> Verifier:
    """A verifier by the converters' reader of a format; read_back.py says what that proves."""

    def check(part: Part, evidence: Evidence) -> ReadBack:
        return read_back.compare(read(part, evidence), evidence.material.update)

    return Verifier(check, "reading the adapters again")


def _check_float(part: Part, evidence: Evidence) -> FileCheck:
    return verify.verdict(evidence.output(part), evidence.reference, evidence.adapter_effect)


def _check_quantised(part: Part, evidence: Evidence) -> FileCheck:
    finest = evidence.finest_float
    return verify.verdict(verify.alone(part.path, part.kind, finest.ids), finest)


VERIFIERS: dict[str, Verifier] = {
    exporters.peft.NAME: _reads_back(lambda part, evidence: peft.read(part.path)),
    exporters.mlx.NAME: _reads_back(lambda part, evidence: mlx.read(part.path)),
    exporters.gguf_adapter.NAME: _reads_back(
        lambda part, evidence: gguf_adapter.read(part.path, evidence.material.base)
    ),
    exporters.merged_gguf.NAME: Verifier(_check_float, "verifying with llama.cpp"),
    exporters.quantised_gguf.NAME: Verifier(_check_quantised, "verifying with llama.cpp", withholds=True),
}


def check_complete(exported: Collection[str], verified: Collection[str]) -> None:
    """Hold the two tables against each other; at import, so that nothing is ever exported that nothing proves."""
    if odd := set(exported) ^ set(verified):
        raise LookupError(f"exporters and verifiers do not match: {', '.join(sorted(odd))}")


check_complete(EXPORTERS, VERIFIERS)


def verify_all(material: Material, parts: Sequence[Part], aside: Path, report: Report) -> Verification:
    """Verify every part, in the order in which they were made. Parts that are withheld are moved into the folder
    `aside`, which is made for them.

    Raises:
        BadModel: a part is not what it should be, or no merged model that was asked for is left.
    """
    evidence, verification, stage = Evidence(material, parts), Verification(), ""
    for part in parts:
        verifier = VERIFIERS[part.exporter]
        if verifier.stage != stage:
            report(stage := verifier.stage)
        try:
            finding = _passing(verifier.check(part, evidence))
        except BadData as error:
            if not verifier.withholds:
                raise BadModel(f"verification failed: {part.name}: {error}", hint=error.hint) from error
            verification.withheld[part.name] = str(error)
            aside.mkdir(exist_ok=True)
            part.path.replace(aside / part.name)
        else:
            if part.released:
                verification.findings[part.name] = finding
    verification.adapter_effect = evidence.adapter_effect
    if not verification.file_checks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in verification.withheld.items())
        raise BadModel(f"verification failed: {reasons}", hint="publish f16 or q8_0 too")
    return verification


def _passing(finding: FileCheck | ReadBack) -> FileCheck | ReadBack:
    """Raises BadModel, with the finding's own words, where it is not within its bound."""
    if not finding.passed:
        raise BadModel(finding.sentence)
    return finding
