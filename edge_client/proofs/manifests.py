"""The manifest of a publication and the signature over it: who signed it, what it lists, and who took part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edge_client.proofs import signers
from oneround import manifest as manifests
from oneround import statements
from oneround.errors import BadData
from oneround.manifest import Manifest
from oneround.v1 import federation_pb2 as pb

MOST_BYTES = manifests.MOST_BYTES
MOST_SIGNATURE_BYTES = 16 * 1024
_TELL = "tell the person who runs the coordinator"


@dataclass(frozen=True)
class SignedManifest:
    """What a coordinator has signed of a publication."""

    manifest: Manifest
    signer: str  # fingerprint of the key


@dataclass(frozen=True)
class Inclusion:
    """What became of a contribution: its weight in the mean (0: it takes no part), and why."""

    weight: float
    why: str


def read(text: bytes, signature: bytes, subject: str) -> SignedManifest:
    """A manifest that is signed; whether its signer is to be believed, is for the caller to judge.

    Raises:
        BadData: the signature does not fit it, or it is no manifest.
    """
    record = pb.Signature()
    signers.parse(signature, record, f"the signature of {subject}")
    signer = signers.signer(record, statements.manifest(hashlib.sha256(text).hexdigest()), subject)
    return SignedManifest(manifests.read(text, subject), signer)


def open_signed(file: Path) -> SignedManifest:
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
    if (manifest.job_name, manifest.version) != (job, announced.version):
        raise BadData(f"the manifest of {version} is that of v{manifest.version} of {manifest.job_name}", hint=_TELL)
    if len({file.name for file in announced.artifacts}) < len(announced.artifacts):
        raise BadData(f"{version} has two files of one name", hint=_TELL)
    beside = (statements.MANIFEST, statements.SIGNATURE)
    offered = {file.name: (file.digest, file.size) for file in announced.artifacts if file.name not in beside}
    signed = {name: (entry.sha256, entry.size) for name, entry in manifest.files.items()}
    if differ := {name for name, _ in offered.items() ^ signed.items()}:
        raise BadData(f"{version} is not as it was signed: {', '.join(sorted(differ))}", hint=_TELL)


def part(manifest: Manifest, receipt: pb.Receipt) -> Inclusion:
    """What became of the contribution that a receipt is for.

    Raises:
        BadData: the two are of different jobs.
    """
    if manifest.job_id != receipt.job_id:
        raise BadData(
            f"the manifest is of another job than the receipt: {manifest.job_name}, {manifest.job_id}; "
            f"{receipt.job}, {receipt.job_id}"
        )
    of_client = [entry for entry in manifest.contributions if entry.id == receipt.client_id[:12]]
    for entry in of_client:
        if entry.digest == receipt.digest:
            return Inclusion(entry.weight, entry.reason or entry.verdict)
    if of_client:
        return Inclusion(0.0, "another contribution of the same client is in its place")
    return Inclusion(0.0, f"it is not among the {len(manifest.contributions)} contributions that were looked at")
