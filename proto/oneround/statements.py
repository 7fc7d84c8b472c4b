"""What a coordinator signs, word for word, so that everybody checks the same: now, later, and without a coordinator.

A statement (see signing.py) is a line `oneround KIND`, then a line for each field: its length in bytes, a space, the
field. A newline is between two lines, and none after the last. Fields are text in UTF-8:

    receipt    the job's id, the job's name, the client's id, the digest, the size in decimal, the time in seconds since
               the Unix epoch as the shortest decimal that reads back as the same 64-bit float
    manifest   the SHA-256 of manifest.json, in hex; it says itself of which job, id and version it is
"""

from __future__ import annotations

from oneround import signing
from oneround.signing import PrivateKey
from oneround.v1 import federation_pb2 as pb

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.signature"  # beside it: a pb.Signature as JSON


def receipt(record: pb.Receipt) -> bytes:
    """What is signed of a receipt: all of it."""
    size, time = str(record.size), repr(record.received_unix)
    return signing.statement("receipt", record.job_id, record.job, record.client_id, record.digest, size, time)


def manifest(digest: str) -> bytes:
    """What is signed of a manifest: the SHA-256 of its bytes, in hex."""
    return signing.statement("manifest", digest)


def sign(key: PrivateKey, statement: bytes) -> pb.Signature:
    """A coordinator's signature over a statement: always the same bytes."""
    return pb.Signature(key=signing.spki(key), value=signing.sign(key, statement))


def signer(signature: pb.Signature, statement: bytes) -> str:
    """The fingerprint of the key that signed a statement; empty if none did. Whose it is, is for others to know."""
    return signing.fingerprint(signature.key) if signing.signed(signature.key, statement, signature.value) else ""
