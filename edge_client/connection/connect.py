"""Which coordinator is meant, and a connection to it: the named one, the one of before wherever it is now, or the only
one on this network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge_client import outbox
from edge_client.connection import channel, discovery, identity, tls_probe, trust
from edge_client.connection.channel import Connection
from edge_client.connection.discovery import DiscoveredCoordinator
from edge_client.connection.remote import Remote, stay
from edge_client.connection.target import Target
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import tls
from oneround.errors import NotEnough, OneroundError, Unreachable, UsageError

_MOST_PLACES = 8  # that are tried; anybody on the network can say anything


@dataclass(frozen=True)
class Roaming:
    """Finds the coordinator with a key again, wherever it is. Connections that were left stay open until `open_now`
    ends, for calls that are still on them."""

    pins: identity.Pins
    target: Target
    state: Path
    screen: Screen
    open_now: AsyncExitStack

    async def find_again(self, lost: Connection) -> Connection | None:
        """Look where it was, where the network says it is, and where it has been before; None to stay.

        A place that still shows the same certificate is kept: gRPC connects to it again by itself, also when this
        machine's own address has changed.
        """
        opening = partial(channel.opened, lost.server, self.pins, _unasked, key=lost.fingerprint, own=self.target.own)
        with suppress(OneroundError):
            if (await tls_probe.look(lost.server, self.target.own)).certificate == lost.certificate:
                return None
            connection = await self.open_now.enter_async_context(opening())  # with a renewed one
            _tell(connection, self.screen)
            return connection
        with suppress(OneroundError):
            connection = await _elsewhere(lost.fingerprint, lost.server, self.pins, self.target, self.open_now)
            _tell(connection, self.screen)
            self.screen.say(events.CoordinatorMoved(lost.server, connection.server))
            outbox.moved(self.state, lost.server, connection.server)
            return connection
        return None


@asynccontextmanager
async def connected(
    target: Target, state: Path, screen: Screen, job: str = "", *, pin: bool = True
) -> AsyncIterator[Remote]:
    """A connection to the named coordinator; or to the one that the job (or the last job) was joined at, wherever it is
    now; or to the one on this network. With `pin` the key of one that was never seen before is pinned, after the
    person has been asked where one is there."""
    pins, own, trusted = identity.Pins(state, keep=pin), target.own, target.trusted
    advertised = ""  # the key that the network says it has

    async def on_first_use(shown: trust.ShownCertificate) -> None:
        if pin:
            await trust.first_time(screen, shown, advertised)
        screen.say(events.Pinned(shown.address, tls.grouped(shown.fingerprint)))

    places = [target.address or _joined_at(state, job)]
    if not places[0]:
        if target.plain:  # who makes itself known speaks TLS
            raise UsageError("which coordinator?", hint="add --server HOST:PORT, as `coordinator serve` prints it")
        chosen = await _discovered(screen, trusted)
        places, advertised = list(chosen.addresses), chosen.fingerprint
    target.require_allowed(places[0])
    me = identity.me(pins.state, keep=pins.keep)
    async with AsyncExitStack() as open_now:
        opening = partial(
            channel.opened, pins=pins, on_first_use=on_first_use, trusted=trusted, own=own, insecure=target.plain
        )
        try:
            connection = await _first_that_answers([partial(opening, place) for place in places], open_now)
        except Unreachable as nobody:
            key = trusted or pins.all().get(places[0])
            if target.plain or key is None:
                raise
            with screen.busy("looking for the coordinator on this network"):
                try:
                    connection = await _elsewhere(key, places[0], pins, target, open_now)
                except Unreachable:
                    raise nobody from None
            screen.say(events.CoordinatorMoved(places[0], connection.server))
            outbox.moved(state, places[0], connection.server)
        _tell(connection, screen)
        roaming = Roaming(pins, target, state, screen, open_now)
        find_again = stay if target.plain else roaming.find_again  # without TLS no coordinator is known by its key
        yield Remote(connection, me, token=target.token, find_again=find_again)


def _tell(connection: Connection, screen: Screen) -> None:
    if connection.before:
        before, now = tls.grouped(connection.before), tls.grouped(connection.fingerprint)
        screen.say(events.KeyChanged(connection.server, before, now))


def _unasked(shown: trust.ShownCertificate) -> None:
    """Of one whose key is known, nobody is asked."""


async def _discovered(screen: Screen, trusted: str) -> DiscoveredCoordinator:
    """The coordinator on this network; the one that says it has the trusted key, if there is one.

    Raises:
        Unreachable: there is none.
        UsageError: there are several, and none was chosen.
    """
    with screen.busy("looking for a coordinator on this network"):
        coordinators = await discovery.look()
    if trusted:
        matching = [coordinator for coordinator in coordinators if coordinator.fingerprint == trusted]
        coordinators = matching[:1] or coordinators
    ask = len(coordinators) > 1 and screen.can_ask
    chosen = await _ask_which(coordinators, screen) if ask else discovery.only(coordinators)
    screen.say(events.CoordinatorFound(chosen.name, chosen.addresses[0]))
    return chosen


async def _elsewhere(key: str, but: str, pins: identity.Pins, target: Target, open_now: AsyncExitStack) -> Connection:
    """A connection to the coordinator with this key at another place: where the network says it is, or where it was.

    Raises:
        Unreachable: it is at none that is known of.
    """
    heard: list[DiscoveredCoordinator] = []
    with suppress(NotEnough):
        heard = await discovery.look(enough=lambda coordinator: coordinator.fingerprint == key)
    advertised = [place for coordinator in heard if coordinator.fingerprint == key for place in coordinator.addresses]
    earlier = [place for place, pinned in pins.all().items() if pinned == key]
    places = [place for place in dict.fromkeys(advertised + earlier) if place != but][:_MOST_PLACES]
    if not places:
        raise Unreachable("nobody on this network has the coordinator's key")
    return await _first_that_answers(
        [partial(channel.opened, place, pins, _unasked, key=key, own=target.own) for place in places], open_now
    )


async def _first_that_answers(
    places: Sequence[Callable[[], AbstractAsyncContextManager[Connection]]], open_now: AsyncExitStack
) -> Connection:
    for place in places[:-1]:
        with suppress(Unreachable):
            return await open_now.enter_async_context(place())
    return await open_now.enter_async_context(places[-1]())


def _joined_at(state: Path, job: str) -> str:
    """Where a job (any, if empty) was last joined; empty if this machine has joined none."""
    joined = outbox.all_outboxes(state)
    return next((box.server() for box in joined if not job or box.folder.name.rpartition("-")[0] == job), "")


async def _ask_which(coordinators: Sequence[DiscoveredCoordinator], screen: Screen) -> DiscoveredCoordinator:
    rows = [
        f"  {number}  {coordinator.name} at {coordinator.addresses[0]},"
        f" key {tls.grouped(coordinator.fingerprint[:16])} …"
        for number, coordinator in enumerate(coordinators, 1)
    ]
    screen.say(events.SeveralCoordinators("\n".join(rows)))
    while True:
        answer = await screen.ask(f"Which one? \\[1-{len(coordinators)}]")
        if not answer:
            raise UsageError("no coordinator was chosen", hint="add --server HOST:PORT")
        if answer.isdecimal() and 1 <= int(answer) <= len(coordinators):
            return coordinators[int(answer) - 1]
