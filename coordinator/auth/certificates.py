"""The certificates that a coordinator shows: its own, signed by itself and made anew in time, or its operator's."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from oneround import signing, tls
from oneround.errors import UsageError

VALID = datetime.timedelta(days=365)
RENEW = VALID / 3  # before its end


def self_signed(key_pem: bytes, changes: Sequence[tls.Change], now: datetime.datetime) -> bytes:
    """A certificate (PEM) for a key that has followed others."""
    key = signing.private(key_pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, tls.NAME)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of laptops are off
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(tls.NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    if changes:
        builder = builder.add_extension(tls.extension(changes), critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)


def holds(certificate: bytes, key_pem: bytes, now: datetime.datetime) -> bool:
    """Whether a certificate of our own is this key's, and for long enough; False also for what is none."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
    except ValueError:
        return False
    dates = parsed.not_valid_before_utc <= now < parsed.not_valid_after_utc - RENEW
    return dates and tls.public_key(certificate) == signing.spki(signing.private(key_pem))


def changes_up_to(certificate: bytes, key_pem: bytes) -> tuple[tls.Change, ...]:
    """The changes that led to a key, by a certificate of it or of one that was to follow it."""
    try:
        changes = tls.changes(certificate)
    except ValueError:
        return ()
    keys = [change.key for change in changes]
    own = signing.spki(signing.private(key_pem))
    return changes[: keys.index(own)] if own in keys else changes if tls.public_key(certificate) == own else ()


def operators(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """The operator's own key and certificate (PEM; its chain may follow it).

    Raises:
        UsageError: they cannot be read, or are none that clients can use.
    """
    try:
        key_pem, certificate_pem = key.read_bytes(), certificate.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}", hint=_HINT) from error
    try:
        private = signing.private(key_pem)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{key} holds no private key that can be used here: {error}", hint=_HINT) from error
    if isinstance(private, ed25519.Ed25519PrivateKey):
        raise UsageError(f"{key} is an Ed25519 key, which gRPC takes no certificate of", hint="use an EC or RSA key")
    try:
        public, name = tls.public_key(certificate_pem), tls.name(certificate_pem)
        ends = x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc
    except ValueError as error:
        raise UsageError(f"{certificate} holds no certificate in PEM form", hint=_HINT) from error
    if public != signing.spki(private):
        raise UsageError(f"the first certificate in {certificate} is not that of the key in {key}", hint=_HINT)
    if not name:
        raise UsageError(f"the certificate in {certificate} names no host", hint="give it a DNS name or an address")
    if ends < datetime.datetime.now(datetime.UTC):
        raise UsageError(f"the certificate in {certificate} ended on {ends:%Y-%m-%d}", hint="have it renewed")
    return key_pem, certificate_pem


def authority(file: Path) -> bytes:
    """The certificates (PEM) of those who may sign clients' certificates.

    Raises:
        UsageError: there are none in this file.
    """
    try:
        certificates = file.read_bytes()
        x509.load_pem_x509_certificates(certificates)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint="--client-ca FILE") from error
    except ValueError as error:
        raise UsageError(f"{file} holds no certificate in PEM form", hint="--client-ca FILE") from error
    return certificates


_HINT = "--tls-certificate FILE --tls-key FILE, both PEM, the key without a password"
