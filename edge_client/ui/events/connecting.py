"""Finding a coordinator, its key, and connections that break."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Address, Event, Fingerprint, Lines, Seconds, Words


@dataclass(frozen=True)
class Pinned(Event):
    """The first connection to a coordinator: its key is pinned from here on."""

    server: Address
    fingerprint: Fingerprint

    template = "First time at {server}: its key is now pinned.\n  fingerprint  {fingerprint}"


@dataclass(frozen=True)
class UnknownCoordinator(Event, event="unknown"):
    """Before a person is asked whether the key of a new coordinator is the right one."""

    server: Address
    fingerprint: Fingerprint

    template = (
        "The coordinator at {server} is not known here. Its key:\n"
        "  fingerprint  {fingerprint}\n"
        "`coordinator serve` prints the right one over there; ask whoever runs it."
    )


@dataclass(frozen=True)
class KeyChanged(Event):
    """A coordinator that is known has a new key, signed by the old one; the new one is pinned."""

    server: Address
    before: Fingerprint
    now: Fingerprint

    template = (
        "The coordinator at {server} has a new key, which the old one has signed. It is pinned now:\n"
        "  before       {before}\n"
        "  now          {now}"
    )


@dataclass(frozen=True)
class Trusted(Event):
    """`trust` has pinned a key."""

    server: Address
    fingerprint: Fingerprint

    template = "Pinned for {server}:\n  fingerprint  {fingerprint}"


@dataclass(frozen=True)
class Unpinned(Event):
    """`trust` has replaced this key by another one."""

    server: Address
    fingerprint: Fingerprint

    template = "No longer pinned for {server}:\n  fingerprint  {fingerprint}"


@dataclass(frozen=True)
class SeveralCoordinators(Event, event="several"):
    """Before a person is asked which of the network's coordinators is meant."""

    rows: Lines

    template = "Several coordinators make themselves known on this network:\n{rows}"


@dataclass(frozen=True)
class CoordinatorFound(Event, event="found"):
    """The coordinator was found on the local network, since no address was given."""

    name: str
    server: Address

    template = "Found [bold]{name}[/bold] on this network, at {server}"


@dataclass(frozen=True)
class CoordinatorMoved(Event, event="moved"):
    """Nobody answers where the coordinator was; its key was found at another address."""

    before: Address
    server: Address

    template = "Nobody answers at {before}; the coordinator with the same key is at {server} now."


@dataclass(frozen=True)
class Retry(Event):
    """The coordinator does not answer. The same trouble is reported once in five minutes."""

    why: Words
    seconds: Seconds

    template = "{why}; trying again in {seconds:.0f} s"
