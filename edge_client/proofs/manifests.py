"""The manifest of a publication and the signature over it: what it holds, and who took part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.settings import Settings
from edge_client.proofs import signers
from oneround import statements
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb

MOST_BYTES = 64 << 20  # of a manifest; a hundred thousand clients are half of it
MOST_SIGNATURE_BYTES = 16 * 1024
_TELL = "tell the person who runs the coordinator"


@dataclass(frozen=True)
class ContributionEntry:
    """One contribution, as a manifest lists it."""

    id: str  # of its client: the first twelve digits of what receipts have
    digest: str
    weight: float  # in the mean; 0: it takes no part
    verdict: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a coordinator has signed of a publication."""

    job: str
    job_id: str
    version: int
    files: Mapping[str, tuple[str, int]]  # SHA-256 and size in bytes, by name
    contributions: Sequence[ContributionEntry]
    signer: str  # fingerprint of the key


@dataclass(frozen=True)
class Participation:
    """What became of a contribution: its weight in the mean (0: it takes no part), and why."""

    weight: float
    why: str


def read(text: bytes, signature: bytes, what: str) -> Manifest:
    """A manifest that is signed; by whom, is for others to judge.

    Raises:
        BadData: the signature does not fit it, or it is no manifest.
    """
    record = pb.Signature()
    signers.parse(signature, record, f"the signature of {what}")
    signer = signers.signer(record, statements.manifest(hashlib.sha256(text).hexdigest()), what)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{what} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadData(f"{what} is not a JSON object")
    table = Settings(values, what, BadData)
    files = table.table("files")
    return Manifest(
        job=table.table("job").text("name"),
        job_id=table.text("job_id"),
        version=table.integer("version"),
        files={name: _file(files.table(name)) for name in files.values},
        contributions=[_given(entry, table) for entry in table.items("contributions")],
        signer=signer,
    )


def open_signed(file: Path) -> Manifest:
    """A manifest in a file, its signature beside it.

    Raises:
        BadData: one of them is missing or not sound, or the signature does not fit.
    """
    signature = file.with_name(f"{file.name}.signature")
    if file.is_file() and not signature.exists():
        raise BadData(
            f"there is no signature beside {file}", hint="edge-client pull JOB, which fetches both and checks them"
        )
    return read(signers.bytes_of(file, MOST_BYTES), signers.bytes_of(signature, MOST_SIGNATURE_BYTES), str(file))


def check(manifest: Manifest, job: str, announced: pb.Publication) -> None:
    """Hold what a coordinator announces of a publication against what was signed of it: the same files, and no others.

    Raises:
        BadData: it is something else.
    """
    version = f"v{announced.version} of {job}"
    if (manifest.job, manifest.version) != (job, announced.version):
        raise BadData(f"the manifest of {version} is that of v{manifest.version} of {manifest.job}", hint=_TELL)
    if len({file.name for file in announced.artifacts}) < len(announced.artifacts):
        raise BadData(f"{version} has two files of one name", hint=_TELL)
    beside = (statements.MANIFEST, statements.SIGNATURE)
    files = {file.name: (file.digest, file.size) for file in announced.artifacts if file.name not in beside}
    if differ := {name for name, _ in files.items() ^ manifest.files.items()}:
        raise BadData(f"{version} is not as it was signed: {', '.join(sorted(differ))}", hint=_TELL)


def part(manifest: Manifest, receipt: pb.Receipt) -> Participation:
    """What became of the contribution that a receipt is for.

    Raises:
        BadData: the two are of different jobs.
    """
    if manifest.job_id != receipt.job_id:
        raise BadData(
            f"the manifest is of another job than the receipt: {manifest.job}, {manifest.job_id}; "
            f"{receipt.job}, {receipt.job_id}"
        )
    mine = [given for given in manifest.contributions if given.id == receipt.client_id[:12]]
    for given in mine:
        if given.digest == receipt.digest:
            return Participation(given.weight, given.reason or given.verdict)
    if mine:
        return Participation(0.0, "another contribution of the same client is in its place")
    return Participation(0.0, f"it is not among the {len(manifest.contributions)} contributions that were looked at")


def _file(entry: Settings) -> tuple[str, int]:
    return entry.text("sha256"), entry.integer("size", low=0, high=2**63 - 1)


def _given(entry: object, table: Settings) -> ContributionEntry:
    if not isinstance(entry, dict):
        raise table.bad("one of its contributions is not an object")
    said = Settings(entry, table.source, BadData)
    return ContributionEntry(
        id=said.text("id"),
        digest=said.text("digest"),
        weight=said.number("weight", positive=False),
        verdict=said.text("verdict"),
        reason=said.text("reason", ""),
    )
