"""Receipts, as they come from a coordinator and as files from anybody: whose word they are, and for what."""

from __future__ import annotations

import re
from pathlib import Path

from edge_client.proofs import signers
from oneround import rules, statements, stream, tls
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb

_MOST_BYTES = 16 * 1024  # of a receipt's file
_YEAR_5000 = 1e11  # seconds since the Unix epoch


def accept(receipt: pb.Receipt, job: pb.Job, client_id: str, digest: str, certificate: bytes) -> pb.Receipt:
    """Hold a receipt that has just come against what it has to say.

    digest: of the adapter that was sent; empty where that is not known here any more. certificate: what the coordinator
    shows, PEM; empty without TLS, where no key is known beforehand, and the receipt shows its own.

    Raises:
        BadData: it is not this coordinator's word for this adapter of this client.
    """
    signer = statements.signer(receipt.signature, statements.receipt(receipt))
    faults = {
        "it is not signed": not receipt.HasField("signature"),
        "its signature does not fit what it says": not signer,
        "it is signed by another key than the coordinator's": certificate and signer != tls.fingerprint(certificate),
        "it is for another job": (receipt.job, receipt.job_id) != (job.spec.name, job.id),
        "it is for another client": receipt.client_id != client_id,
        "it is for another adapter than the one here": digest and receipt.digest != digest,
    }
    for fault, applies in faults.items():
        if applies:
            raise BadData(
                f"what the coordinator gave is no receipt: {fault}. The adapter stays here",
                hint="tell the person who runs the coordinator, and run the same command again",
            )
    return receipt


def read(file: Path) -> pb.Receipt:
    """A receipt from a file that anybody may have written. Its signature is another matter.

    Raises:
        BadData: it is none.
    """
    receipt = pb.Receipt()
    signers.parse(signers.bytes_of(file, _MOST_BYTES), receipt, f"{file} should be a receipt, and")
    sound = (
        rules.is_job_name(receipt.job)
        and re.fullmatch(r"[0-9a-f]{32}", receipt.job_id)
        and re.fullmatch(r"[0-9a-f]{32}", receipt.client_id)
        and stream.is_digest(receipt.digest)
        and receipt.size > 0
        and 0 <= receipt.received_unix < _YEAR_5000
    )
    if not sound:
        raise BadData(f"{file} is no receipt: what it says of job, client, adapter or time cannot be")
    return receipt


def signer(receipt: pb.Receipt) -> str:
    """The fingerprint of the key that signed a receipt.

    Raises:
        BadData: none did.
    """
    if not receipt.HasField("signature"):
        raise BadData(
            "this receipt is not signed: it was made before receipts were signed",
            hint="edge-client join again, which fetches a signed one",
        )
    return signers.signer(receipt.signature, statements.receipt(receipt), "this receipt")
