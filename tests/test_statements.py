"""What is signed, byte for byte: whoever checks a receipt in ten years, with other programs, has to get the same."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oneround import signing, statements
from oneround.signing import PrivateKey
from oneround.v1 import federation_pb2 as pb

RECEIPT = pb.Receipt(job="notes", job_id="1" * 32, client_id="c" * 32, digest="d" * 64, size=20544)
RECEIPT.received_unix = 1763748968.1234567
KEYS: dict[str, Callable[[], PrivateKey]] = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
}


def test_the_words() -> None:
    lines = ["oneround receipt", f"32 {'1' * 32}", "5 notes", f"32 {'c' * 32}", f"64 {'d' * 64}", "5 20544"]
    assert statements.receipt(RECEIPT).decode().split("\n") == [*lines, "18 1763748968.1234567"]
    assert statements.manifest("e" * 64) == b"oneround manifest\n64 " + b"e" * 64


@pytest.mark.parametrize("kind", KEYS)
def test_the_same_receipt_has_the_same_signature(kind: str) -> None:
    key, other = KEYS[kind](), KEYS[kind]()
    said = statements.receipt(RECEIPT)
    signature = statements.sign(key, said)
    assert signature == statements.sign(key, said) != statements.sign(other, said)
    assert statements.signer(signature, said) == signing.fingerprint(signing.spki(key))
    assert statements.signer(signature, said + b" ") == ""
    assert statements.signer(pb.Signature(key=signing.spki(other), value=signature.value), said) == ""


def _dsa() -> bytes:
    return dsa.generate_private_key(1024).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _unheard_of() -> bytes:
    """A key on a curve that nobody knows: its object identifier is one off."""
    der = signing.spki(ec.generate_private_key(ec.SECP256R1()))
    return der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030177"))


@pytest.mark.parametrize("der", [b"", b"\x30" * 200, _dsa(), _unheard_of()], ids=["none", "noise", "dsa", "curve"])
def test_what_is_no_key_signs_nothing(der: bytes) -> None:
    assert statements.signer(pb.Signature(key=der, value=b"1" * 64), b"anything") == ""
