"""Who this client is, and which coordinators it knows. Both live in the state folder and outlast every job."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from converters import tensors
from converters.errors import BadData, Refused
from oneround import tls


def client_id(state: Path) -> str:
    """32 hex digits, made once per state folder; contributions are idempotent on it."""
    file = state / "client-id"
    if not file.exists():
        tensors.replace(file, [secrets.token_hex(16).encode()])
    return file.read_text().strip()


class Pins:
    """The key fingerprints of coordinators, by address, as ssh keeps those of hosts."""

    def __init__(self, state: Path, *, keep: bool = True) -> None:
        """`keep`: what is seen for the first time is written down."""
        self._file = state / "known-coordinators.json"
        self._keep = keep

    def check(self, address: str, fingerprint: str) -> bool:
        """Pin an address's key on first use; returns whether this was the first use.

        Raises:
            Refused: the key is not the one that was pinned.
        """
        pinned = self.all().get(address)
        if pinned is None and not self._keep:
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
