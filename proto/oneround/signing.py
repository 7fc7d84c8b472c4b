"""Statements that one end signs and the other can check, now or years later: who a client is, that a contribution is
safe, what a publication holds, that one key follows another."""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


def statement(kind: str, *fields: str) -> bytes:
    """The bytes of a statement: what kind it is, and its fields, each with its length before it, so that no two
    statements read alike."""
    lines = [f"oneround {kind}", *(f"{len(field.encode())} {field}" for field in fields)]
    return "\n".join(lines).encode()


def sign_in(coordinator: str, challenge: bytes, token: str) -> bytes:
    """What a client signs to be let in: for the coordinator with this key fingerprint (empty without TLS) and no other,
    so that nobody in between can sign in elsewhere with it."""
    return statement("sign-in", coordinator, challenge.hex(), token)


def client_id(der: bytes) -> str:
    """What a client is known by: the first 32 hex digits of its key's fingerprint."""
    return fingerprint(der)[:32]


def public_id(client_id: str) -> str:
    """A client as people name it, in tables and manifests: the first twelve hex digits of its id."""
    return client_id[:12]


def private(pem: bytes) -> PrivateKey:
    """An unencrypted private key.

    Raises:
        ValueError: it is none, or of a kind that is not used here.
    """
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, PrivateKey):
        raise ValueError(f"a {type(key).__name__} is not used here")
    return key


def public(der: bytes) -> PublicKey:
    """A public key from its SubjectPublicKeyInfo; bytes from a stranger.

    Raises:
        ValueError: it is none, or of a kind that is not used here.
    """
    try:
        key = serialization.load_der_public_key(der)
    except UnsupportedAlgorithm as error:  # a curve that OpenSSL has never heard of
        raise ValueError(str(error)) from error
    if not isinstance(key, PublicKey):
        raise ValueError(f"a {type(key).__name__} is not used here")
    return key


def spki(key: PrivateKey | PublicKey) -> bytes:
    """A key's public half as DER (SubjectPublicKeyInfo): how it travels, and what its fingerprint is of."""
    half = key.public_key() if isinstance(key, PrivateKey) else key
    return half.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(der: bytes) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo), in hex."""
    return hashlib.sha256(der).hexdigest()


def sign(key: PrivateKey, statement: bytes) -> bytes:
    """A signature; the same key signs the same statement with the same bytes."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(statement)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(statement, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return key.sign(statement, padding.PKCS1v15(), hashes.SHA256())


def signed(der: bytes, statement: bytes, signature: bytes) -> bool:
    """Whether the holder of a public key (SubjectPublicKeyInfo) signed a statement; False also for what is no key."""
    try:
        key = public(der)
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, statement)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
        else:
            key.verify(signature, statement, padding.PKCS1v15(), hashes.SHA256())
    except (ValueError, InvalidSignature):
        return False
    return True
