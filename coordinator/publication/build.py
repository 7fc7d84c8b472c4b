"""From contributions to a publication: aggregate, export, verify, and only then put it in place.

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from google.protobuf import json_format

from converters import architectures
from converters.architectures import Base
from converters.gguf import file as gguf_file
from converters.gguf import merge as gguf_merge
from converters.updates.low_rank import LowRank
from coordinator import aggregate
from coordinator.aggregate import Aggregated
from coordinator.publication import cohort, exporters, model_card, verifiers
from coordinator.publication.order import BuildOrder
from coordinator.publication.parts import Material, Part, Report
from coordinator.publication.verifiers import Verification
from oneround import files, manifest, statements, stream
from oneround.errors import FULL, LayoutMismatch, NotEnough, OneroundError
from oneround.manifest import ContributionEntry, FileEntry, Manifest, QuantisedEntry

_MADE_WITH = ("oneround", "gguf", "llama-cpp-python", "numpy")


def publish(order: BuildOrder, report: Report) -> None:
    """Make the publication of an order and put it in place, verified.

    Raises:
        OneroundError: a step failed; what was made stands beside the publication's place, in `NAME.failed`.
    """
    work, failed = order.beside(".partial"), order.beside(".failed")
    for left_over in (work, failed, order.beside(".withheld")):
        shutil.rmtree(left_over, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _build(order, work, report)
    except OneroundError:
        work.replace(failed)
        raise
    shutil.rmtree(order.folder, ignore_errors=True)
    work.replace(order.folder)
    files.sync_folder(order.folder.parent)


def _build(order: BuildOrder, work: Path, report: Report) -> None:
    """Make and verify everything in the folder `work`. The manifest comes last, and lists the rest."""
    base = architectures.describe(order.base_folder, order.base_gguf)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        aggregated, entries = _aggregate(order, Path(scratch), report)
        material = Material(order.spec, aggregated.adapter, base, order.base_gguf)
        parts = exporters.export(material, work, report)
        verification = verifiers.verify_all(material, parts, order.beside(".withheld"), report)
    released = _release(parts, verification)
    unlisted = _manifest(order, aggregated, entries, parts, verification, _rounding(order, base))
    model_card.write(work, order.spec, unlisted, released)
    whole = replace(unlisted, files=_listed(work))
    files.replace(work / statements.MANIFEST, [manifest.to_json(whole)])


def _aggregate(order: BuildOrder, scratch: Path, report: Report) -> tuple[Aggregated[LowRank], list[ContributionEntry]]:
    """The cohort's update, and what the manifest says of every contribution."""
    report("comparing the contributions")
    start, sent = cohort.start(order, scratch), cohort.read(order)
    assessments = cohort.assess(order, sent, start)
    taking = cohort.taking_part(order, assessments)
    report("aggregating")
    updates = cohort.updates(order, taking, sent, assessments, start)
    try:
        aggregated = aggregate.aggregate(
            updates, order.spec.aggregate, rank=order.spec.publish.adapter_rank, scratch=scratch, start=start
        )
    except LayoutMismatch as error:  # closed by hand, or with some set aside: fewer than the method needs
        again = f"coordinator publish {order.spec.name} --method exact"
        raise LayoutMismatch(str(error), hint=f"`{again}` takes any") from error
    weights = dict(zip((candidate.id for candidate in taking), aggregated.weights, strict=True))
    entries = [
        cohort.entry(candidate, assessments[candidate.id], weights.get(candidate.id, 0.0))
        for candidate in order.contributions
    ]
    return aggregated, [*entries, *order.set_aside]


def _release(parts: Sequence[Part], verification: Verification) -> list[Part]:
    """The parts that the publication holds. Those that only served to make and to check others are removed."""
    for part in parts:
        if not part.released:
            part.path.unlink()
    return [part for part in parts if part.released and part.name not in verification.withheld]


def _manifest(
    order: BuildOrder,
    aggregated: Aggregated[LowRank],
    entries: Sequence[ContributionEntry],
    parts: Sequence[Part],
    verification: Verification,
    base_rounding: float,
) -> Manifest:
    """What the publication says of itself, but for the list of its files."""
    quantised = {part.name: part.quantised for part in parts if part.quantised}
    return Manifest(
        job=json_format.MessageToDict(order.spec, preserving_proto_field_name=True),
        job_id=order.job_id,
        version=order.version,
        reason=order.reason,
        base_fingerprint=order.base_fingerprint,
        base_rounding=base_rounding,
        method=order.spec.aggregate.method,
        rank=max(aggregated.adapter.ranks.values()),
        energy_kept=aggregated.energy_kept,
        started_from=order.started_from,
        contributions=entries,
        quantised={name: QuantisedEntry(types=q.types, fallbacks=q.fallbacks) for name, q in quantised.items()},
        verification=verification.file_checks,
        read_back=verification.read_back,
        adapter_effect=verification.adapter_effect,
        withheld=verification.withheld,
        made_with={name: importlib.metadata.version(name) for name in _MADE_WITH},
    )


def _listed(folder: Path) -> dict[str, FileEntry]:
    """Every file in a folder, by its name there."""
    return {
        file.relative_to(folder).as_posix(): FileEntry(sha256=stream.digest(file), size=file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


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
