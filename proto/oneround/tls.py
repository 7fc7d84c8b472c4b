"""How a coordinator is known: by the fingerprint of its key, whatever its address or its certificate's dates."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oneround import signing

# The certificate names no host, since laptops and LANs change addresses; clients ask for this name instead.
NAME = "oneround-coordinator"


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a PEM certificate's public key (SubjectPublicKeyInfo), in hex: what clients pin."""
    return signing.fingerprint(public_key(certificate))


def public_key(certificate: bytes) -> bytes:
    """A PEM certificate's public key, as DER (SubjectPublicKeyInfo)."""
    public = x509.load_pem_x509_certificate(certificate).public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def grouped(fingerprint: str) -> str:
    """A fingerprint in groups of four, for two people to compare aloud."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))
