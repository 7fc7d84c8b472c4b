"""How a coordinator is known: by the fingerprint of its key, whatever its address or its certificate's dates; and by
the keys that it had before, each of which has signed that the next one follows it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from oneround import signing

# Our own certificate names no host, since laptops and LANs change addresses; clients ask for this name instead.
NAME = "oneround-coordinator"

# The extension with the keys that a certificate's key follows; an OID from a UUID, as X.667 has it. Its value is JSON:
# a list of [key, signature] in base64, oldest first.
CHANGES = x509.ObjectIdentifier("2.25.164975156937119390734821128855853084305")
MOST_CHANGES = 8  # that are kept, and looked at; a certificate may come from anybody


@dataclass(frozen=True)
class Change:
    """A key (SubjectPublicKeyInfo, DER) and its signature of that another one follows it."""

    key: bytes
    signature: bytes


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


def ungrouped(text: str) -> str:
    """A whole fingerprint as somebody typed or copied it, grouped or not; empty when it is none."""
    plain = "".join(text.replace(":", " ").split()).lower()
    return plain if len(plain) == 64 and set(plain) <= set("0123456789abcdef") else ""


def name(certificate: bytes) -> str:
    """A name that a PEM certificate is for, and that a client may ask for which knows its key; empty if it has none."""
    parsed = x509.load_pem_x509_certificate(certificate)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(common[0].value) if common else ""
    hosts = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    return next((host.replace("*", "any") for host in hosts), str(addresses[0]) if addresses else "")


def change(old: signing.PrivateKey, new: bytes) -> Change:
    """Let a key (SubjectPublicKeyInfo, DER) follow an old one."""
    key = signing.spki(old)
    return Change(key, signing.sign(old, _follows(key, new)))


def changes(certificate: bytes) -> tuple[Change, ...]:
    """The changes, oldest first, that led to a PEM certificate's key; only those that are signed as they must be."""
    parsed = x509.load_pem_x509_certificate(certificate)
    try:
        value = parsed.extensions.get_extension_for_oid(CHANGES).value
        assert isinstance(value, x509.UnrecognizedExtension), "it is ours"
        rows = json.loads(value.value)
        claimed = [Change(*(base64.b64decode(text, validate=True) for text in (key, by))) for key, by in rows]
    except (x509.ExtensionNotFound, ValueError, TypeError, RecursionError):
        return ()
    proven: list[Change] = []
    new = public_key(certificate)
    for change in reversed(claimed[-MOST_CHANGES:]):
        if not signing.signed(change.key, _follows(change.key, new), change.signature):
            break
        proven.insert(0, change)
        new = change.key
    return tuple(proven)


def earlier(certificate: bytes) -> tuple[str, ...]:
    """The fingerprints of the keys, oldest first, that a PEM certificate's key follows by their own signatures."""
    return tuple(signing.fingerprint(change.key) for change in changes(certificate))


def extension(key_changes: Sequence[Change]) -> x509.UnrecognizedExtension:
    """What a certificate says of the keys before its own."""
    rows = [
        [base64.b64encode(part).decode() for part in (change.key, change.signature)]
        for change in key_changes[-MOST_CHANGES:]
    ]
    return x509.UnrecognizedExtension(CHANGES, json.dumps(rows).encode())


def _follows(old: bytes, new: bytes) -> bytes:
    return signing.statement("key change", signing.fingerprint(old), signing.fingerprint(new))
