"""The manifest of a publication, `manifest.json`: what went in, how it was checked, and every file's SHA-256.

A coordinator signs its bytes (statements.py), and anybody may read it, years later and with another version: what is
written here is public. A key never changes its meaning; a new one gets a default here, and old readers pass over it.
`python -m oneround.manifest` prints the schema, which is docs/manifest.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from google.protobuf import json_format

from oneround import rules, typed_json
from oneround.errors import BadData
from oneround.typed_json import Limits
from oneround.v1 import federation_pb2 as pb

MOST_BYTES = 64 << 20  # a hundred thousand clients are half of it

Digest = Annotated[str, Limits("SHA-256, in hex", pattern="[0-9a-f]{64}", expected="64 hex digits")]
Name = Annotated[str, Limits(pattern="[^\\x00-\\x1f\\x7f]{1,1024}", expected="a name")]
Count = Annotated[int, Limits(low=0)]
Norm = Annotated[float, Limits("‖ΔW‖ over all modules, as it came; absent where it was set aside unread", low=0)]
Cosine = Annotated[float, Limits("to the mean of the others; null: there was nothing to compare", low=-1, high=1)]
Perplexity = Annotated[float, Limits("of the probe", low=0)]


@dataclass(frozen=True, kw_only=True)
class ContributionEntry:
    """One contribution: whose it is, what was made of it, and how much it counts."""

    client: Annotated[str, Limits("the client's name, as it gave it")]
    id: Annotated[str, Limits("the first twelve digits of the client id; empty in the first manifests", longest=64)] = (
        ""
    )
    digest: Digest
    num_examples: Annotated[int, Limits("training examples that the client declared", low=0)]
    weight: Annotated[float, Limits("in the aggregate; 0: it takes no part")]
    verdict: Annotated[str, Limits("admitted, clipped or quarantined", longest=64)] = ""
    reason: Annotated[str, Limits("of the verdict; empty for a plain admission")] = ""
    norm: Norm | None = None
    cosine: Cosine | None = None


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """How far a merged GGUF is from what it should say, as llama.cpp runs it, and the bound that it was held to."""

    measure: Annotated[str, Limits("relative_logit_difference, or mean_divergence in nats per token", longest=64)]
    value: Annotated[float, Limits("the distance, by that measure")]
    bound: Annotated[float, Limits("the most that the distance may be")]
    against: Annotated[str, Limits("`base + adapter`, or the type of the float file", longest=64)] = ""
    top1_agreement: Annotated[
        float, Limits("share of probe positions where the most likely token is the same", low=0, high=1)
    ]
    perplexity: Perplexity | None = None
    perplexity_against: Perplexity | None = None
    passed: Annotated[bool, Limits("whether the distance is within the bound")] = True

    @property
    def sentence(self) -> str:
        """Why it did not pass."""
        return f"{self.measure.replace('_', ' ')} from {self.against} is {self.value:.3g}, over {self.bound:g}"


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """An adapter's file or folder, read again and held against the aggregated update, module by module."""

    modules: Annotated[int, Limits("how many were compared", low=0)]
    largest_difference: Annotated[float, Limits("of any factor, relatively: ‖difference‖ / ‖factor‖", low=0)]
    bound: Annotated[float, Limits("the most that the difference may be", low=0)]
    passed: Annotated[bool, Limits("whether the difference is within the bound")] = True

    @property
    def sentence(self) -> str:
        """Why it did not pass."""
        return f"what it holds is off the aggregated update by {self.largest_difference:.3g}, over {self.bound:g}"


@dataclass(frozen=True)
class QuantisedEntry:
    """What a quantised file holds: tensors by type, and those whose rows do not divide into the type's blocks."""

    types: Annotated[Mapping[Name, Count], Limits("type -> number of tensors")]
    fallbacks: Annotated[Mapping[Name, Name], Limits("tensor -> the type that it has instead")]


@dataclass(frozen=True)
class FileEntry:
    """A file of the publication."""

    sha256: Digest
    size: Annotated[int, Limits("in bytes", low=0)]


@dataclass(frozen=True)
class StartedFrom:
    """What all clients began with, in a job that starts from an earlier adapter; empty for a fresh one."""

    job: Annotated[str, Limits("the earlier job; absent: a file on the coordinator's machine", longest=64)] = ""
    job_id: Annotated[str, Limits("the earlier job's id", longest=64)] = ""
    version: Annotated[int, Limits("the version that it had published by then", low=0)] = 0
    digest: Annotated[str, Limits("SHA-256 of that version's manifest.json, or of the file", longest=64)] = ""

    def __bool__(self) -> bool:
        return self != StartedFrom()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole document; its fields are in the order of the file's keys."""

    job: Annotated[Mapping[str, Any], Limits("the job, as the JSON of JobSpec in federation.proto")]
    job_id: Annotated[str, Limits("32 hex digits; empty in the first manifests", longest=64)] = ""
    version: Annotated[int, Limits("of the job's publications: 1, 2, …", low=1, high=2**31 - 1)]
    reason: Annotated[str, Limits("why this version was made")] = ""
    base_fingerprint: Annotated[str, Limits("of the base model's files", longest=200)] = ""
    base_rounding: Annotated[float, Limits("what a quantised base GGUF had lost, relatively; 0: floats", low=0)] = 0.0
    method: Annotated[str, Limits("how the updates became one", longest=200)] = ""
    rank: Annotated[int, Limits("of the published adapter: the largest of its modules'", low=0)] = 0
    energy_kept: Annotated[float, Limits("share of ‖ΔW‖² that truncation to the rank left")] = 1.0
    started_from: StartedFrom = StartedFrom()
    contributions: Annotated[Sequence[ContributionEntry], Limits("all that were looked at or set aside")] = ()
    quantised: Annotated[Mapping[Name, QuantisedEntry], Limits("by file")] = field(default_factory=dict)
    verification: Annotated[Mapping[Name, FileCheck], Limits("by merged file")] = field(default_factory=dict)
    read_back: Annotated[Mapping[Name, ReadBack], Limits("by an adapter's file or folder")] = field(
        default_factory=dict
    )
    adapter_effect: Annotated[float, Limits("relative logit difference of base + adapter from the base", low=0)] = 0.0
    withheld: Annotated[Mapping[Name, str], Limits("why, by quantised file that is not released")] = field(
        default_factory=dict
    )
    made_with: Annotated[Mapping[Name, str], Limits("versions of what made it")] = field(default_factory=dict)
    files: Annotated[Mapping[Name, FileEntry], Limits("all but the manifest and its signature")] = field(
        default_factory=dict
    )

    @property
    def job_name(self) -> str:
        return str(self.job["name"])


def read(text: bytes, source: str) -> Manifest:
    """A manifest that anybody may have written, of this version of the software or another; `source` is its name in
    messages.

    Raises:
        BadData: it is none, or a value is of the wrong type or out of range.
    """
    manifest = typed_json.read(Manifest, text, source, most=MOST_BYTES)
    try:
        spec = json_format.ParseDict(dict(manifest.job), pb.JobSpec(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise BadData(f"{source}: job is no job: {str(error).splitlines()[0][:200]}") from error
    if not rules.is_job_name(spec.name):
        raise BadData(f"{source}: its job has no name")
    return manifest


def open_file(file: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        BadData: it cannot be read, or is none.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise BadData(f"{file} is not there") from None
    except OSError as error:
        raise BadData(f"{file} cannot be read: {error.strerror}") from error
    return read(text, str(file))


def to_json(manifest: Manifest) -> bytes:
    """The document; the same manifest gives the same bytes, whatever the order of its mappings' making."""
    document = asdict(manifest)
    document["started_from"] = {key: value for key, value in document["started_from"].items() if value}
    for entry in document["contributions"]:
        if entry["norm"] is None:  # set aside before its cohort was compared
            del entry["norm"], entry["cosine"]
    return json.dumps(document, indent=2, allow_nan=False).encode()


def schema() -> str:
    """The JSON Schema of the document, as docs/manifest.schema.json has it."""
    about = (__doc__ or "").partition("\n")[0]
    return json.dumps(typed_json.schema(Manifest, "oneround manifest", about), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
