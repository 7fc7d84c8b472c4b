"""The coordinator's TLS key and certificate, and the token that its operator's commands carry."""

from __future__ import annotations

import datetime
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from converters import tensors
from oneround import tls

_VALID = datetime.timedelta(days=3650)


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


def load_or_create(folder: Path) -> Identity:
    """The identity in `folder`, made on the first start; readable by its owner alone."""
    folder.mkdir(parents=True, exist_ok=True)
    key_file, certificate_file, token_file = folder / "key.pem", folder / "certificate.pem", folder / "admin-token"
    secret_file = folder / "session-secret"
    if not key_file.exists():
        _write_private(
            key_file,
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
    if not certificate_file.exists():
        _write_private(certificate_file, _self_signed(key_file.read_bytes()))
    if not token_file.exists():
        _write_private(token_file, secrets.token_urlsafe(32).encode())
    if not secret_file.exists():
        _write_private(secret_file, secrets.token_bytes(32))
    return Identity(
        key_file.read_bytes(),
        certificate_file.read_bytes(),
        token_file.read_text().strip(),
        secret_file.read_bytes(),
    )


def _self_signed(key_pem: bytes) -> bytes:
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "made above"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, tls.NAME)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of laptops are off
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(tls.NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _write_private(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        tensors.sync(file)
    partial.replace(path)
