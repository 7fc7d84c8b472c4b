"""Who this client is, and which coordinators it knows. Both live in the state folder and outlast every job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from converters import tensors
from converters.errors import BadData, Refused
from oneround import signing, tls


@dataclass(frozen=True)
class Me:
    """This client's key. Whoever holds it is this client."""

    key: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return signing.spki(self.key)

    @property
    def client_id(self) -> str:
        """32 hex digits; contributions are idempotent on it."""
        return signing.client_id(self.public_key)


def me(state: Path, *, keep: bool = True) -> Me:
    """The key in a state folder, made on the first use; with `keep` off a new one is kept nowhere.

    Raises:
        BadData: the file holds no such key.
    """
    file = state / "client-key.pem"
    if not file.exists():
        made = passing()
        if keep:
            pem = made.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            state.mkdir(parents=True, exist_ok=True)
            tensors.replace(file, [pem], private=True)
        return made
    try:
        found = signing.private(file.read_bytes())
        if isinstance(found, Ed25519PrivateKey):
            return Me(found)
        why = "it holds another kind of key"
    except ValueError as error:
        why = str(error)
    raise BadData(f"{file} is damaged: {why}", hint="remove it, and join as a new client")


def passing() -> Me:
    """A key that is kept nowhere, for who only asks."""
    return Me(Ed25519PrivateKey.generate())


class Pins:
    """The key fingerprints of coordinators, by address, as ssh keeps those of hosts."""

    def __init__(self, state: Path, *, keep: bool = True) -> None:
        """`keep`: what is seen for the first time is written down."""
        self.state, self.keep = state, keep
        self._file = state / "known-coordinators.json"

    def check(self, address: str, fingerprint: str) -> bool:
        """Pin an address's key on first use; returns whether this was the first use.

        Raises:
            Refused: the key is not the one that was pinned.
        """
        pinned = self.all().get(address)
        if pinned is None and not self.keep:
            return True
        if pinned is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            tensors.replace(self._file, [json.dumps({**self.all(), address: fingerprint}, indent=2).encode()])
            return True
        if pinned != fingerprint:
            raise Refused(
                f"the coordinator at {address} has another key than the last time. It was set up anew, or somebody "
                f"else answers in its place.\n  pinned  {tls.grouped(pinned)}\n  now     {tls.grouped(fingerprint)}",
                hint=f"compare with what `coordinator serve` prints; if that is it, remove {address} from {self._file}",
            )
        return False

    def all(self) -> dict[str, str]:
        """The pinned fingerprints, by address."""
        try:
            return json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}
        except ValueError as error:
            raise BadData(
                f"{self._file} is damaged: {error}", hint="remove it, and compare fingerprints anew"
            ) from error
