"""The coordinator's TLS key and certificate, and the token that its operator's commands carry."""

from __future__ import annotations

import datetime
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.auth import certificates
from oneround import files, signing, tls


@dataclass(frozen=True)
class OwnFiles:
    """The operator's own certificate (its chain may follow it) and its key, in PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Identity:
    """PEM key and certificate, the key's fingerprint, the admin token, and what sessions are made with."""

    key: bytes
    certificate: bytes
    admin_token: str
    session_secret: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key (SubjectPublicKeyInfo), in hex: what clients pin."""
        return tls.fingerprint(self.certificate)


def load_or_create(folder: Path, own: OwnFiles | None = None, now: datetime.datetime | None = None) -> Identity:
    """The identity in `folder`, made on the first start and readable by its owner alone; the certificate is made anew,
    with the same key, when it is about to end. With `own` the operator's key and certificate.

    Raises:
        UsageError: the operator's are none that can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if own is not None:
        key, certificate = certificates.operators(own.certificate, own.key)
        return Identity(key, certificate, admin_token(folder), _session_secret(folder))
    key_file, certificate_file = folder / "key.pem", folder / "certificate.pem"
    if not key_file.exists():
        _write_private(key_file, _new_key())
    key, now = key_file.read_bytes(), now or datetime.datetime.now(datetime.UTC)
    certificate = certificate_file.read_bytes() if certificate_file.exists() else b""
    if not certificates.holds(certificate, key, now):
        certificate = certificates.self_signed(key, certificates.changes_up_to(certificate, key), now)
        _write_private(certificate_file, certificate)
    return Identity(key, certificate, admin_token(folder), _session_secret(folder))


def admin_token(folder: Path) -> str:
    """What the operator's commands prove themselves by; made on the first start."""
    file = folder / "admin-token"
    if not file.exists():
        _write_private(file, secrets.token_urlsafe(32).encode())
    return file.read_text().strip()


def _session_secret(folder: Path) -> bytes:
    file = folder / "session-secret"
    if not file.exists():
        _write_private(file, secrets.token_bytes(32))
    return file.read_bytes()


def rotate(folder: Path) -> tuple[str, str]:
    """Put a new key in the place of the one in `folder`, which signs that the new one follows it, and is gone then.

    Gives both fingerprints. The daemon must not run meanwhile."""
    before, key = load_or_create(folder), _new_key()
    followed = tls.change(signing.private(before.key), signing.spki(signing.private(key)))
    changes = (*certificates.changes_up_to(before.certificate, before.key), followed)
    after = certificates.self_signed(key, changes, datetime.datetime.now(datetime.UTC))
    # In this order: a certificate without its key is made anew for the old one, a key without its certificate has lost
    # what the old one signed.
    for name, content in (("certificate.pem", after), ("key.pem", key)):
        _write_private(folder / name, content)
        files.sync_folder(folder)
    return before.fingerprint, tls.fingerprint(after)


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        files.sync(file)
    partial.replace(path)
