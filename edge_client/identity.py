"""Who this client is, and which coordinators it knows. Both live in the state folder and outlast every job."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from converters import tensors
from converters.errors import BadData

DEFAULT_STATE = Path(platformdirs.user_data_dir("oneround")) / "client"


def client_id(state: Path) -> str:
    """32 hex digits, made once per state folder; contributions are idempotent on it."""
    file = state / "client-id"
    if not file.exists():
        tensors.replace(file, [secrets.token_hex(16).encode()])
    return file.read_text().strip()


@dataclass(frozen=True)
class Pin:
    """A coordinator's key, and those that it had before, oldest first: what they signed stays signed."""

    fingerprint: str
    earlier: tuple[str, ...] = ()


class Pins:
    """The key fingerprints of coordinators, by address, as ssh keeps those of hosts."""

    def __init__(self, state: Path, *, keep: bool = True) -> None:
        """`keep`: what is pinned is written down."""
        self.state = state
        self._file = state / "known-coordinators.json"
        self._keep = keep

    def known(self) -> dict[str, Pin]:
        """What is pinned, by address.

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
        return {address: pin.fingerprint for address, pin in self.known().items()}

    def earlier(self, fingerprint: str) -> frozenset[str]:
        """The keys that the coordinator with this key had before."""
        pins = self.known().values()
        return frozenset(key for pin in pins if pin.fingerprint == fingerprint for key in pin.earlier)

    def pin(self, address: str, fingerprint: str, follows: Sequence[str] = ()) -> None:
        """Pin the key at an address, and wherever one is pinned that it `follows`, which is kept as an earlier one."""
        known = self.known()
        made = dict(known)
        for place, pin in known.items():
            if pin.fingerprint in follows:
                before = (*(key for key in pin.earlier if key not in follows), *follows)
                made[place] = Pin(fingerprint, before)
        if address not in made or made[address].fingerprint != fingerprint:
            same = (pin for pin in made.values() if pin.fingerprint == fingerprint)
            made[address] = next(same, Pin(fingerprint))
        if self._keep and made != known:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            rows = {place: asdict(pin) for place, pin in made.items()}
            tensors.replace(self._file, [json.dumps(rows, indent=2).encode()])


def _pin(row: str | dict[str, object]) -> Pin:
    if isinstance(row, str):  # as it was written before keys could change
        return Pin(row)
    earlier = row["earlier"]
    if not isinstance(earlier, list):
        raise TypeError("`earlier` is not a list")
    return Pin(str(row["fingerprint"]), tuple(map(str, earlier)))
