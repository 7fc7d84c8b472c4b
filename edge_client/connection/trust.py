"""Whether the one that answers is the coordinator that is meant: by its key, and by nothing else. Pure, but for the
question that a person is asked at the first time."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from pathlib import Path

from cryptography import x509

from edge_client.connection.identity import DEFAULT_STATE, Pin
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import tls
from oneround.errors import Refused, Unreachable


@dataclass(frozen=True)
class ShownCertificate:
    """What the one at an address shows before anything is said to it: a certificate whose key it has proven to hold."""

    address: str
    certificate: bytes  # PEM

    @cached_property
    def fingerprint(self) -> str:
        return tls.fingerprint(self.certificate)

    @cached_property
    def earlier(self) -> tuple[str, ...]:
        """The keys that its key follows by their own signatures, oldest first."""
        return tls.earlier(self.certificate)

    def has(self, key: str) -> bool:
        """Whether its key is this one, or follows it."""
        return key == self.fingerprint or key in self.earlier


class KeyStanding(Enum):
    """What a key is to somebody who has pinned others."""

    PINNED = auto()
    FOLLOWS = auto()  # a pinned one, which signed that it does
    ELSEWHERE = auto()  # pinned at another address, where it was met first
    NEW = auto()
    CHANGED = auto()  # another one is pinned at this address
    GIVEN_UP = auto()  # its coordinator has had a later one since


def standing(shown: ShownCertificate, pins: Mapping[str, Pin]) -> KeyStanding:
    """What the key that is shown is, by what is pinned."""
    pinned = pins.get(shown.address)
    if pinned is not None and pinned.fingerprint == shown.fingerprint:
        return KeyStanding.PINNED
    if pinned is not None and pinned.fingerprint in shown.earlier:
        return KeyStanding.FOLLOWS
    if any(shown.fingerprint in pin.earlier for pin in pins.values()):
        return KeyStanding.GIVEN_UP
    if pinned is not None:
        return KeyStanding.CHANGED
    keys = {pin.fingerprint for pin in pins.values()}
    if shown.fingerprint in keys:
        return KeyStanding.ELSEWHERE
    return KeyStanding.FOLLOWS if keys.intersection(shown.earlier) else KeyStanding.NEW


def require(shown: ShownCertificate, standing: KeyStanding, pins: Mapping[str, Pin], state: Path) -> None:
    """Raises:
    Refused: by this standing nobody may go on without a person's word.
    """
    accept = shlex.join(["edge-client", "trust", shown.address, shown.fingerprint, *_state(state)])
    hint = f"compare with what `coordinator serve` prints over there; only if it is the same:\n  {accept}"
    if standing is KeyStanding.CHANGED:
        raise Refused(
            f"the coordinator at {shown.address} has another key than the last time, and the old one has not signed "
            "it. It was set up anew, or somebody else answers in its place.\n"
            f"  pinned  {tls.grouped(pins[shown.address].fingerprint)}\n"
            f"  now     {tls.grouped(shown.fingerprint)}",
            hint=hint,
        )
    if standing is KeyStanding.GIVEN_UP:
        raise Refused(
            f"the one at {shown.address} has a key that its coordinator gave up for another. It was brought back from "
            f"an old backup, or somebody else answers in its place.\n  now     {tls.grouped(shown.fingerprint)}",
            hint=hint,
        )


def require_named(shown: ShownCertificate, named: str) -> None:
    """Raises:
    Refused: the key is not the one that a person has named, and does not follow it.
    """
    if not shown.has(named):
        raise Refused(
            f"the one at {shown.address} has another key than you trust.\n"
            f"  trusted  {tls.grouped(named)}\n  now      {tls.grouped(shown.fingerprint)}",
            hint="compare with what `coordinator serve` prints over there; somebody else may answer in its place",
        )


def require_dates(certificate: bytes, now: datetime.datetime) -> datetime.datetime:
    """When a PEM certificate ends.

    Raises:
        Unreachable: it does not hold now, so that nobody can connect.
    """
    shown = x509.load_pem_x509_certificate(certificate)
    begins, ends = shown.not_valid_before_utc, shown.not_valid_after_utc
    if now < begins:
        raise Unreachable(
            f"by this machine's clock, {now:%Y-%m-%d %H:%M} UTC, the coordinator's certificate does not hold before "
            f"{begins:%Y-%m-%d %H:%M}",
            hint="set this machine's clock",
        )
    if now > ends:
        raise Unreachable(
            f"the coordinator's certificate ended on {ends:%Y-%m-%d}, by this machine's clock, {now:%Y-%m-%d}",
            hint="look at this machine's clock; if it is right, the operator starts the coordinator again, or renews "
            "the certificate that was given to it",
        )
    return ends


def left_behind(shown: ShownCertificate, pins: Mapping[str, Pin]) -> str:
    """The pinned key that the one that is shown follows; empty if there is none."""
    return next((pin.fingerprint for pin in pins.values() if pin.fingerprint in shown.earlier), "")


async def first_time(screen: Screen, shown: ShownCertificate, advertised: str) -> None:
    """Meet a coordinator whose key nobody here knows. Where nobody can be asked, an address that a person named is
    taken, and one that only the network has said (`said`, with this fingerprint) is not.

    Raises:
        Refused: it is not to be trusted.
    """
    if advertised and not shown.has(advertised):
        raise Refused(
            f"on this network a coordinator with one key makes itself known at {shown.address}, and one with another "
            f"answers there.\n  said   {tls.grouped(advertised)}\n  shown  {tls.grouped(shown.fingerprint)}",
            hint="add --server HOST:PORT, as `coordinator serve` prints it",
        )
    if screen.can_ask:
        screen.say(events.UnknownCoordinator(shown.address, tls.grouped(shown.fingerprint)))
        answer = await screen.ask("Is it the same there? \\[y/N, or type it]")
        if answer not in ("y", "yes") and tls.ungrouped(answer) != shown.fingerprint:
            raise Refused(
                f"the key of the coordinator at {shown.address} was not accepted: it is not pinned, nothing is sent",
                hint=f"add --trust {shown.fingerprint}  once somebody has compared it",
            )
    elif advertised:
        raise Refused(
            f"the coordinator at {shown.address} was only heard of on this network, where anybody can say anything, "
            f"and its key is not known here.\n  fingerprint  {tls.grouped(shown.fingerprint)}",
            hint="compare with what `coordinator serve` prints over there; if it is the same, "
            f"add --trust {shown.fingerprint}",
        )


def _state(state: Path) -> list[str]:
    return [] if state == DEFAULT_STATE else ["--state", str(state)]
