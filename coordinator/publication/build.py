"""From contributions to a publication: aggregate, convert, merge, quantise, verify, and only then put it in place.

Runs as a child of the daemon (`python -m coordinator.publication.build ORDER.json`), so that heavy work neither holds
the event loop nor leaves its memory behind. It is a function of its order: killed at any instant, it can be run again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES
from google.protobuf import json_format

from converters import architectures, mlx, peft
from converters.adapter import Adapter
from converters.architectures import Base
from converters.gguf import adapter as gguf_adapter
from converters.gguf import file as gguf_file
from converters.gguf import merge as gguf_merge
from converters.gguf import quantize as gguf_quantize
from converters.gguf.quantize import Quantised
from converters.updates import kinds
from coordinator import aggregate
from coordinator.admission import outliers
from coordinator.admission.outliers import Assessment, Member
from coordinator.aggregate import ClientUpdate, changes, clipped
from coordinator.publication import model_card, verify
from coordinator.publication.model_card import CardFacts
from coordinator.publication.verify import FileCheck, Verification
from oneround import files, stream
from oneround.errors import FULL, BadModel, LayoutMismatch, NotEnough, OneroundError
from oneround.v1 import federation_pb2 as pb

Report = Callable[[str], None]
_MADE_WITH = ("oneround", "gguf", "llama-cpp-python", "numpy")


@dataclass(frozen=True)
class Candidate:
    """One contribution that is sound by itself."""

    client: str
    id: str
    digest: str
    num_examples: int
    received: float
    by_hand: bool  # admitted by the operator
    earlier: str  # why an earlier cohort set it aside; empty if none did
    file: Path


@dataclass(frozen=True)
class BuildOrder:
    """Everything that a publication is a function of."""

    spec: pb.JobSpec
    job_id: str
    version: int
    reason: str
    at_least: int  # contributions that have to be left once the cohort is judged
    base_folder: Path
    base_gguf: Path
    base_fingerprint: str
    contributions: Sequence[Candidate]
    set_aside: Sequence[dict[str, Any]]  # what takes no part, as the manifest lists it
    folder: Path  # where the publication will stand
    # What clients started from: where A is frozen, its A goes with every contribution; in a job that starts from an
    # earlier adapter, it is in every contribution.
    initial: Path | None = None
    started_from: Mapping[str, Any] = field(default_factory=dict)  # as the manifest has it

    def to_json(self) -> str:
        table = asdict(self) | {"spec": json_format.MessageToDict(self.spec, preserving_proto_field_name=True)}
        return json.dumps(table, default=str)

    @staticmethod
    def from_json(text: str) -> BuildOrder:
        table = json.loads(text)
        table["spec"] = json_format.ParseDict(table["spec"], pb.JobSpec())
        table["contributions"] = [
            Candidate(**{**given, "file": Path(given["file"])}) for given in table["contributions"]
        ]
        for key in ("base_folder", "base_gguf", "folder"):
            table[key] = Path(table[key])
        table["initial"] = Path(table["initial"]) if table["initial"] else None
        return BuildOrder(**table)


def publish(order: BuildOrder, report: Report) -> None:
    """Make the publication of an order and put it in place, verified.

    Raises:
        OneroundError: a step failed; what was made stands beside the publication's place, in `NAME.failed`.
    """
    work = order.folder.with_name(f"{order.folder.name}.partial")
    failed = order.folder.with_name(f"{order.folder.name}.failed")
    withheld = order.folder.with_name(f"{order.folder.name}.withheld")
    for left_over in (work, failed, withheld):
        shutil.rmtree(left_over, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _make(order, work, report)
    except OneroundError:
        work.replace(failed)
        raise
    shutil.rmtree(order.folder, ignore_errors=True)
    work.replace(order.folder)
    files.sync_folder(order.folder.parent)


@dataclass(frozen=True)
class MergedFile:
    """A merged file of one type, and what a quantised one holds."""

    kind: str
    file: Path
    quantised: Quantised | None = None


@dataclass(frozen=True)
class Assessed:
    """A contribution and what its cohort makes of it; `adapter` is scaled down where it was clipped."""

    given: Candidate
    finding: Assessment
    adapter: Adapter

    def listed(self, weight: float) -> dict[str, Any]:
        """As the manifest has it, with how much it counts."""
        return {
            "client": self.given.client,
            "id": self.given.id,
            "digest": self.given.digest,
            "num_examples": self.given.num_examples,
            "weight": weight,
            "verdict": self.finding.verdict,
            "reason": self.finding.reason,
            "norm": self.finding.norm,
            "cosine": self.finding.cosine,
        }


def started_from(order: BuildOrder, scratch: Path) -> Adapter | None:
    """What every contribution holds, in a job that starts from an earlier adapter; kept in the folder `scratch`.

    Rounded as contributions are, so that what a client left as it was is no change.
    """
    if not kinds.settings(order.spec).start_from:
        return None
    assert order.initial, "a job that starts from an adapter has it"
    kind = kinds.kind_of(order.spec)
    file, whole = scratch / "start.safetensors", kind.read(order.initial)
    initial = stream.digest(order.initial) if kind.is_partial(order.spec) else ""
    kind.write(whole, file, order.spec.upload.dtype, initial)
    return kind.read(file, whole)


def judged(order: BuildOrder, start: Adapter | None = None) -> list[Assessed]:
    """The cohort, in the order of the contributions; with a `start`, by what each changed of it."""
    arrived = sorted(order.contributions, key=lambda given: (given.received, given.id))
    kind, frozen = kinds.kind_of(order.spec), kinds.frozen(order.spec, order.initial)
    whole = {given.id: kind.read(given.file, frozen) for given in arrived}
    members = [
        Member(given.id, given.client, changes(whole[given.id], start), given.num_examples, given.by_hand)
        for given in arrived
    ]
    by_factor = kind.is_partial(order.spec) or aggregate.METHODS[order.spec.aggregate.method].needs_one_rank
    small = len(members) < outliers.COHORT
    found = {
        given.id: Assessed(
            given,
            _upheld(given, finding) if small else finding,
            clipped(whole[given.id], finding.scale, start, by_factor=by_factor),
        )
        for given, finding in zip(arrived, outliers.judge(members, order.spec.admission), strict=True)
    }
    return [found[given.id] for given in order.contributions]


def _upheld(given: Candidate, finding: Assessment) -> Assessment:
    """In a cohort that is too small to tell, what a larger one found holds."""
    if not given.earlier or given.by_hand or finding.verdict == "quarantined":
        return finding
    return replace(finding, verdict="quarantined", reason=given.earlier)


def _make(order: BuildOrder, work: Path, report: Report) -> None:
    base = architectures.describe(order.base_folder, order.base_gguf)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        report("comparing the contributions")
        start = started_from(order, Path(scratch))
        judged_all = judged(order, start)
        taking = [judged for judged in judged_all if judged.finding.verdict != "quarantined"]
        if len(taking) < order.at_least:
            reasons = "; ".join(f"{one.given.client}: {one.finding.reason}" for one in judged_all if one not in taking)
            raise BadModel(
                f"{len(taking)} contributions are left of at least {order.at_least}: {reasons}",
            )
        report("aggregating")
        try:
            result = aggregate.aggregate(
                [ClientUpdate(judged.adapter, judged.given.num_examples) for judged in taking],
                order.spec.aggregate,
                rank=order.spec.publish.adapter_rank,
                scratch=Path(scratch),
                start=start,
            )
        except LayoutMismatch as error:  # closed by hand, or with some set aside: fewer than the method needs
            again = f"coordinator publish {order.spec.name} --method exact"
            raise LayoutMismatch(str(error), hint=f"`{again}` takes any") from error
        rank = max(result.adapter.ranks.values())
        report("writing the adapter")
        peft.write(result.adapter, work / "peft", base_model=order.spec.model.base)
        mlx.write(result.adapter, work / "mlx", base)
        gguf_adapter.write(result.adapter, work / "adapter.gguf", base)
        merged = _merge(order, base, result.adapter, work, report)
    report("verifying with llama.cpp")
    checked = _verify(order, merged, work)
    for made in merged:
        if made.kind not in order.spec.publish.gguf:  # made to be quantised, and to hold others against
            made.file.unlink()
            checked.verdicts.pop(made.file.name)

    weights = {judged.given.id: weight for judged, weight in zip(taking, result.weights, strict=True)}
    counting = [judged.given.num_examples for judged in taking if weights[judged.given.id] > 0]
    rounding = _rounding(order, base)
    quantised = {made.file.name: made.quantised for made in merged if made.quantised}
    facts = CardFacts(
        spec=order.spec,
        version=order.version,
        n_clients=len(counting),
        n_examples=sum(counting),
        rank=rank,
        energy_kept=result.energy_kept,
        checked=checked,
        fallbacks={name: made.fallbacks for name, made in quantised.items()},
        base_rounding=rounding,
        started_from=order.started_from,
    )
    model_card.write(work, facts)
    manifest: dict[str, Any] = {
        "job": json_format.MessageToDict(order.spec, preserving_proto_field_name=True),
        "job_id": order.job_id,
        "version": order.version,
        "reason": order.reason,
        "base_fingerprint": order.base_fingerprint,
        "base_rounding": rounding,
        "method": order.spec.aggregate.method,
        "rank": rank,
        "energy_kept": result.energy_kept,
        "started_from": order.started_from,
        "contributions": [judged.listed(weights.get(judged.given.id, 0.0)) for judged in judged_all]
        + list(order.set_aside),
        "quantised": {name: asdict(made) for name, made in quantised.items()},
        "verification": {name: verdict.as_json() for name, verdict in checked.verdicts.items()},
        "adapter_effect": checked.adapter_effect,
        "withheld": checked.withheld,
        "made_with": {name: importlib.metadata.version(name) for name in _MADE_WITH},
        "files": {
            file.relative_to(work).as_posix(): {"sha256": stream.digest(file), "size": file.stat().st_size}
            for file in sorted(work.rglob("*"))
            if file.is_file()
        },
    }
    files.replace(work / "manifest.json", [json.dumps(manifest, indent=2).encode()])


def _merge(order: BuildOrder, base: Base, mean: Adapter, work: Path, report: Report) -> list[MergedFile]:
    """The merged models that the job asks for, float types from fine to coarse first. Quantised ones are made from the
    finest float file; where none is asked for, one of the checkpoint's own precision is made for that."""
    wanted = list(order.spec.publish.gguf)
    floats = [kind for kind in gguf_merge.FLOAT_TYPES if kind in wanted] or [base.dtype]
    merged = [MergedFile(kind, work / f"{order.spec.name}-{kind}.gguf") for kind in floats]
    for made in merged:
        report(f"merging into {made.kind}")
        accept = order.spec.model.accept_quantised_gguf
        gguf_merge.merge(order.base_gguf, mean, made.file, made.kind, base, accept_quantised=accept)
    for kind in wanted:
        if kind not in floats:
            report(f"quantising to {kind}")
            file = work / f"{order.spec.name}-{kind}.gguf"
            merged.append(MergedFile(kind, file, gguf_quantize.quantize(merged[0].file, file, kind)))
    return merged


def _verify(order: BuildOrder, merged: Sequence[MergedFile], work: Path) -> Verification:
    """Have llama.cpp judge every file; quantised ones that fail are moved aside.

    Raises:
        BadModel: a float file is not base + adapter, or nothing that was asked for is left.
    """
    reference = verify.base_and_adapter(order.base_gguf, work / "adapter.gguf")
    base = verify.alone(order.base_gguf, reference.kind, reference.ids)
    effect = verify.difference(base.logits, reference.logits)
    verdicts: dict[str, FileCheck] = {}
    withheld: dict[str, str] = {}

    floats = [made for made in merged if not made.quantised]
    said = [verify.alone(made.file, made.kind, reference.ids) for made in floats]
    for made, heard in zip(floats, said, strict=True):
        found = verify.verdict(heard, reference, effect)
        if not found.passed:
            raise BadModel(f"verification failed: {made.file.name}: {found.sentence}")
        verdicts[made.file.name] = found

    aside = order.folder.with_name(f"{order.folder.name}.withheld")
    for made in merged[len(floats) :]:
        name = made.file.name
        try:
            found = verify.verdict(verify.alone(made.file, made.kind, reference.ids), said[0])
            reason = "" if found.passed else found.sentence
        except BadModel as error:
            reason = str(error)
        if reason:
            withheld[name] = reason
            aside.mkdir(exist_ok=True)
            made.file.replace(aside / name)
        else:
            verdicts[name] = found
    if not any(made.kind in order.spec.publish.gguf and made.file.name in verdicts for made in merged):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in withheld.items())
        raise BadModel(f"verification failed: {reasons}", hint="publish f16 or q8_0 too")
    return Verification(verdicts, withheld, effect)


def _rounding(order: BuildOrder, base: Base) -> float:
    """What a quantised base has lost against the checkpoint that clients trained over, relatively; 0.0 for floats."""
    types = {tensor.info.type for tensor in gguf_file.read(order.base_gguf).tensors.values()}
    quantised = any(GGML_QUANT_SIZES[kind][0] > 1 for kind in types)
    return gguf_merge.rounding(order.base_gguf, order.base_folder, base) if quantised else 0.0


def main() -> int:
    """Stages go out as lines of JSON; the last line of a failure has `failed`."""

    def report(stage: str) -> None:
        print(json.dumps({"stage": stage}), flush=True)

    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(10)  # the daemon answers its clients first
    try:
        publish(BuildOrder.from_json(Path(sys.argv[1]).read_text()), report)
    except OneroundError as error:
        print(json.dumps({"failed": str(error), "hint": error.hint}), flush=True)
        return error.exit_code
    except OSError as error:
        traceback.print_exc()
        print(json.dumps({"failed": str(error)}), flush=True)
        return NotEnough.exit_code if error.errno in FULL else 1
    except Exception as error:  # a fault of ours: the operator gets a sentence, the log gets the rest
        traceback.print_exc()
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    return 0


def _end_with_parent() -> None:
    """Our input closes when the daemon dies, however it dies; its successor starts this work anew."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
