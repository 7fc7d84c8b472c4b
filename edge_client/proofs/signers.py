"""Whose key signed something: the keys that this machine knows, and what strangers' files say of theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message

from edge_client.connection.identity import Pins
from oneround import statements, tls
from oneround.errors import BadData, UsageError
from oneround.v1 import federation_pb2 as pb

Keys = Mapping[str, Collection[str]]  # fingerprints, by whose they are


def pinned_keys(pins: Pins) -> Keys:
    """The keys that this machine has pinned, by the address of their coordinator, with those that they followed."""
    return {address: {pin.fingerprint, *pin.earlier} for address, pin in pins.by_address().items()}


def connected(pins: Pins, certificate: bytes) -> Collection[str]:
    """The keys of a coordinator that shows a certificate (PEM): its own, and those that it follows."""
    shown = tls.fingerprint(certificate)
    return {shown, *tls.earlier(certificate), *pins.earlier(shown)}


def trusted(pins: Pins, fingerprint: str) -> Keys:
    """The one key that a person names, or else all that are pinned.

    Raises:
        UsageError: this is no fingerprint.
    """
    if not fingerprint:
        return {f"the coordinator at {address}": prints for address, prints in pinned_keys(pins).items()}
    digits = tls.ungrouped(fingerprint)
    if not digits:
        raise UsageError(
            f"{fingerprint!r} is not a key fingerprint: a fingerprint has 64 hex digits",
            hint="copy it from what `coordinator serve` prints, and put it in quotation marks",
        )
    return {"the given key": {digits}}


def owners(fingerprint: str, keys: Keys, subject: str) -> list[str]:
    """The names of those who hold a key.

    Raises:
        BadData: the key belongs to none of them.
    """
    names = [name for name, prints in keys.items() if fingerprint in prints]
    if not names:
        another = (
            "another key than the given one" if "the given key" in keys else "a key that this machine has not pinned"
        )
        raise BadData(
            f"{subject} is signed by {another}: {tls.grouped(fingerprint)}",
            hint="ask who runs the coordinator for its fingerprint, and give that with --fingerprint",
        )
    return names


def signer(signature: pb.Signature, statement: bytes, subject: str) -> str:
    """The fingerprint of the key that signed a statement.

    Raises:
        BadData: none did.
    """
    fingerprint = statements.signer(signature, statement)
    if not fingerprint:
        raise BadData(f"the signature does not fit {subject}: one of the two was changed, or is of something else")
    return fingerprint


def parse(text: bytes, record: Message, subject: str) -> None:
    """Read a record of ours from a stranger's JSON.

    Raises:
        BadData: it is none.
    """
    try:
        json_format.Parse(text, record)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise BadData(f"{subject} cannot be read: {str(error).splitlines()[0][:200]}") from error


def bytes_of(file: Path, at_most: int) -> bytes:
    """A stranger's file.

    Raises:
        BadData: it is not there, no file, or larger than so many bytes.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(at_most + 1)
    except OSError as error:
        raise BadData(f"{file} cannot be read: {error.strerror}") from error
    if len(content) > at_most:
        raise BadData(f"{file} has more than {at_most:,} bytes, and is no such file")
    return content
