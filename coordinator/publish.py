"""From contributions to a publication: aggregate, convert, merge, quantise, verify, and only then put it in place.

Runs as a child of the daemon (`python -m coordinator.publish ORDER.json`), so that heavy work neither holds the event
loop nor leaves its memory behind. It is a function of its order: killed at any instant, it can be run again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from converters import adapter, architectures, gguf_adapter, gguf_merge, mlx, peft, tensors
from converters.adapter import Adapter
from converters.architectures import Base
from converters.errors import BadModel, OneroundError
from coordinator import aggregate, verify
from coordinator.aggregate import Contribution
from oneround import stream
from oneround.v1 import federation_pb2 as pb

Report = Callable[[str], None]


@dataclass(frozen=True)
class Given:
    """One admitted contribution."""

    client: str
    digest: str
    num_examples: int
    file: Path


@dataclass(frozen=True)
class Order:
    """Everything that a publication is a function of."""

    spec: pb.JobSpec
    version: int
    base_folder: Path
    base_gguf: Path
    base_fingerprint: str
    contributions: Sequence[Given]
    folder: Path  # where the publication will stand

    def to_json(self) -> str:
        table = asdict(self) | {"spec": json_format.MessageToDict(self.spec, preserving_proto_field_name=True)}
        return json.dumps(table, default=str)

    @staticmethod
    def from_json(text: str) -> Order:
        table = json.loads(text)
        table["spec"] = json_format.ParseDict(table["spec"], pb.JobSpec())
        table["contributions"] = [Given(**{**given, "file": Path(given["file"])}) for given in table["contributions"]]
        for key in ("base_folder", "base_gguf", "folder"):
            table[key] = Path(table[key])
        return Order(**table)


def publish(order: Order, report: Report) -> None:
    """Make the publication of an order and put it in place, verified.

    Raises:
        OneroundError: a step failed; what was made stands beside the publication's place, in `NAME.failed`.
    """
    work = order.folder.with_name(f"{order.folder.name}.partial")
    failed = order.folder.with_name(f"{order.folder.name}.failed")
    for left_over in (work, failed):
        shutil.rmtree(left_over, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _make(order, work, report)
    except OneroundError:
        work.replace(failed)
        raise
    shutil.rmtree(order.folder, ignore_errors=True)
    work.replace(order.folder)
    tensors.sync_folder(order.folder.parent)


def _make(order: Order, work: Path, report: Report) -> None:
    base = architectures.describe(order.base_folder)
    report("aggregating")
    method = order.spec.aggregate
    result = aggregate.aggregate(
        [Contribution(adapter.read(given.file), given.num_examples) for given in order.contributions],
        method.method,
        server_learning_rate=method.server_learning_rate,
        rank=order.spec.publish.adapter_rank,
    )
    report("writing the adapter")
    peft.write(result.adapter, work / "peft", base_model=order.spec.model.base)
    mlx.write(result.adapter, work / "mlx", base)
    gguf_adapter.write(result.adapter, work / "adapter.gguf", base)

    merged, types = _merge(order, base, result.adapter, work, report)

    report("verifying with llama.cpp")
    against = verify.reference(order.base_gguf, work / "adapter.gguf")
    verdicts = {file.name: verify.verify(file, kind, against) for kind, file in merged.items()}
    wrong = [f"{name}: {v.measure} {v.value:.3g} is over {v.bound:g}" for name, v in verdicts.items() if not v.passed]
    if wrong:
        raise BadModel("verification failed: " + "; ".join(wrong))

    manifest: dict[str, Any] = {
        "job": json_format.MessageToDict(order.spec, preserving_proto_field_name=True),
        "version": order.version,
        "base_fingerprint": order.base_fingerprint,
        "method": method.method,
        "energy_kept": result.energy_kept,
        "contributions": [
            {"client": given.client, "digest": given.digest, "num_examples": given.num_examples}
            for given in order.contributions
        ],
        "quantised_tensors": types,
        "verification": {name: verdict.as_json() for name, verdict in verdicts.items()},
        "made_with": {name: importlib.metadata.version(name) for name in ("oneround", "gguf", "llama-cpp-python")},
        "files": {
            file.relative_to(work).as_posix(): {"sha256": stream.digest(file), "size": file.stat().st_size}
            for file in sorted(work.rglob("*"))
            if file.is_file()
        },
    }
    tensors.replace(work / "manifest.json", [json.dumps(manifest, indent=2).encode()])


def _merge(
    order: Order, base: Base, mean: Adapter, work: Path, report: Report
) -> tuple[dict[str, Path], dict[str, dict[str, int]]]:
    """The merged models that the job asks for, by type, and how many tensors of each type quantised ones hold: rows
    that a type does not fit fall back to another. Quantised ones come from the finest float file."""
    wanted = list(order.spec.publish.gguf)
    floats = [kind for kind in gguf_merge.FLOAT_TYPES if kind in wanted] or ["f16"]
    files = {kind: work / f"{order.spec.name}-{kind}.gguf" for kind in {*floats, *wanted}}
    types = {}
    for kind in floats:
        report(f"merging into {kind}")
        gguf_merge.merge(order.base_gguf, mean, files[kind], kind, base)
    for kind in wanted:
        if kind not in floats:
            report(f"quantising to {kind}")
            types[files[kind].name] = gguf_merge.quantize(files[floats[0]], files[kind], kind)
    for kind in set(floats) - set(wanted):
        files.pop(kind).unlink()
    return {kind: files[kind] for kind in wanted}, types


def main() -> int:
    """Stages go out as lines of JSON; the last line of a failure has `failed`."""

    def report(stage: str) -> None:
        print(json.dumps({"stage": stage}), flush=True)

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        publish(Order.from_json(Path(sys.argv[1]).read_text()), report)
    except OneroundError as error:
        print(json.dumps({"failed": str(error)}), flush=True)
        return error.exit_code
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
