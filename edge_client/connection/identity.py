"""Who this client is, and which coordinators it knows. Both live in the state folder and outlast every job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from oneround import files, signing
from oneround.errors import BadData

DEFAULT_STATE = Path(platformdirs.user_data_dir("oneround")) / "client"


@dataclass(frozen=True)
class ClientKey:
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


def me(state: Path, *, keep: bool = True) -> ClientKey:
    """The key in a state folder, made on the first use; with `keep` off a new one is kept nowhere.

    Raises:
        BadData: the file holds no such key.
    """
    file = state / "client-key.pem"
    if not file.exists():
        created = passing()
        if keep:
            pem = created.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            state.mkdir(parents=True, exist_ok=True)
            files.replace(file, [pem], private=True)
        return created
    try:
        key = signing.private(file.read_bytes())
        if isinstance(key, Ed25519PrivateKey):
            return ClientKey(key)
        why = "it holds another kind of key"
    except ValueError as error:
        why = str(error)
    raise BadData(f"{file} is damaged: {why}", hint="remove it, and join as a new client")


def passing() -> ClientKey:
    """A key that is kept nowhere, for who only asks."""
    return ClientKey(Ed25519PrivateKey.generate())


@dataclass(frozen=True)
class Pin:
    """A coordinator's key, and those that it had before, oldest first: what they signed stays signed."""

    fingerprint: str
    earlier: tuple[str, ...] = ()


class Pins:
    """The key fingerprints of coordinators, by address, as ssh keeps those of hosts."""

    def __init__(self, state: Path, *, keep: bool = True) -> None:
        """`keep`: what is pinned is written down."""
        self.state, self.keep = state, keep
        self._file = state / "known-coordinators.json"

    def by_address(self) -> dict[str, Pin]:
        """The pins by address.

        Raises:
            BadData: the file is damaged.
        """
        try:
            rows = json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}
            return {address: _pin(row) for address, row in rows.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadData(
                f"{self._file} is damaged: {error}", hint="remove it, and compare fingerprints anew"
            ) from error

    def all(self) -> dict[str, str]:
        """The pinned fingerprints, by address."""
        return {address: pin.fingerprint for address, pin in self.by_address().items()}

    def earlier(self, fingerprint: str) -> frozenset[str]:
        """The keys that the coordinator with this key had before."""
        pins = self.by_address().values()
        return frozenset(key for pin in pins if pin.fingerprint == fingerprint for key in pin.earlier)

    def pin(self, address: str, fingerprint: str, follows: Sequence[str] = ()) -> None:
        """Pin the key at an address, and wherever one is pinned that it `follows`, which is kept as an earlier one."""
        pins = self.by_address()
        changed = dict(pins)
        for place, pin in pins.items():
            if pin.fingerprint in follows:
                before = (*(key for key in pin.earlier if key not in follows), *follows)
                changed[place] = Pin(fingerprint, before)
        if address not in changed or changed[address].fingerprint != fingerprint:
            same = (pin for pin in changed.values() if pin.fingerprint == fingerprint)
            changed[address] = next(same, Pin(fingerprint))
        if self.keep and changed != pins:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            rows = {place: asdict(pin) for place, pin in changed.items()}
            files.replace(self._file, [json.dumps(rows, indent=2).encode()])


def _pin(row: str | dict[str, object]) -> Pin:
    if isinstance(row, str):  # as it was written before keys could change
        return Pin(row)
    earlier = row["earlier"]
    if not isinstance(earlier, list):
        raise TypeError("`earlier` is not a list")
    return Pin(str(row["fingerprint"]), tuple(map(str, earlier)))
