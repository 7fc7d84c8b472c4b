"""Which coordinator is meant, and a connection to it: the named one, the one of before wherever it is now, or the only
one on this network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from edge_client import outbox
from edge_client.connection import discovery, identity, tls_probe, trust
from edge_client.connection.discovery import DiscoveredCoordinator
from edge_client.connection.remote import Remote, connect
from edge_client.connection.target import Target
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import tls
from oneround.errors import NotEnough, OneroundError, Unreachable, UsageError

_MOST_PLACES = 8  # that are tried; anybody on the network can say anything


class RoamingRemote(Remote):
    """A connection to the coordinator with a key, wherever it is."""

    def __init__(
        self, first: Remote, pins: identity.Pins, target: Target, state: Path, screen: Screen, open_now: AsyncExitStack
    ) -> None:
        self.go_on_over(first)
        self._pins, self._target, self._state, self._screen, self._open_now = pins, target, state, screen, open_now
        self._looking = asyncio.Lock()

    async def find_again(self, lost: str) -> bool:
        """Look for it where it was, where the network says it is, and where it has been before.

        A place that still shows the same certificate is kept: gRPC connects there again by itself, also when this
        machine's own address has changed. Connections that were left stay open until the end, for calls that are still
        on them.
        """
        async with self._looking:
            if self.server != lost:
                return True
            here = partial(connect, lost, self._pins, _unasked, key=self.fingerprint, own=self._target.own)
            with suppress(OneroundError):
                if (await tls_probe.look(lost, self._target.own)).certificate == self.certificate:
                    return False
                self._go_on(await self._open_now.enter_async_context(here()))  # with a renewed one
                return True
            with suppress(OneroundError):
                self._go_on(await _elsewhere(self.fingerprint, lost, self._pins, self._target, self._open_now))
                self._screen.say(events.CoordinatorMoved(lost, self.server))
                outbox.moved(self._state, lost, self.server)
            return self.server != lost

    def _go_on(self, other: Remote) -> None:
        self.go_on_over(other)
        _tell(other, self._screen)


@asynccontextmanager
async def connected(
    target: Target, state: Path, screen: Screen, job: str = "", *, pin: bool = True
) -> AsyncIterator[Remote]:
    """A connection to the named coordinator; or to the one that the job (or the last job) was joined at, wherever it is
    now; or to the one on this network. With `pin` the key of one that was never seen before is pinned, after the
    person has been asked where one is there."""
    pins, own, trusted = identity.Pins(state, keep=pin), target.own, target.trusted
    said = ""  # the key that the network says it has

    async def on_first_use(shown: trust.ShownCertificate) -> None:
        if pin:
            await trust.first_time(screen, shown, said)
        screen.say(events.Pinned(shown.address, tls.grouped(shown.fingerprint)))

    places = [target.address or _joined_at(state, job)]
    if not places[0]:
        if target.plain:  # who makes itself known speaks TLS
            raise UsageError("which coordinator?", hint="add --server HOST:PORT, as `coordinator serve` prints it")
        chosen = await _found(screen, trusted)
        places, said = list(chosen.addresses), chosen.fingerprint
    target.require_allowed(places[0])
    async with AsyncExitStack() as open_now:
        opening = partial(
            connect,
            pins=pins,
            on_first_use=on_first_use,
            trusted=trusted,
            own=own,
            insecure=target.plain,
            token=target.token,
        )
        try:
            remote = await _first_that_answers([partial(opening, place) for place in places], open_now)
        except Unreachable as nobody:
            key = trusted or pins.all().get(places[0])
            if target.plain or key is None:
                raise
            with screen.busy("looking for the coordinator on this network"):
                try:
                    remote = await _elsewhere(key, places[0], pins, target, open_now)
                except Unreachable:
                    raise nobody from None
            screen.say(events.CoordinatorMoved(places[0], remote.server))
            outbox.moved(state, places[0], remote.server)
        _tell(remote, screen)
        yield remote if target.plain else RoamingRemote(remote, pins, target, state, screen, open_now)


def _tell(remote: Remote, screen: Screen) -> None:
    if remote.before:
        before, now = tls.grouped(remote.before), tls.grouped(remote.fingerprint)
        screen.say(events.KeyChanged(remote.server, before, now))


def _unasked(shown: trust.ShownCertificate) -> None:
    """Of one whose key is known, nobody is asked."""


async def _found(screen: Screen, trusted: str) -> DiscoveredCoordinator:
    """The coordinator on this network; the one that says it has the trusted key, if there is one.

    Raises:
        Unreachable: there is none.
        UsageError: there are several, and none was chosen.
    """
    with screen.busy("looking for a coordinator on this network"):
        found = await discovery.look()
    if trusted:
        found = [each for each in found if each.fingerprint == trusted][:1] or found
    chosen = await _ask_which(found, screen) if len(found) > 1 and screen.can_ask else discovery.only(found)
    screen.say(events.CoordinatorFound(chosen.name, chosen.addresses[0]))
    return chosen


async def _elsewhere(key: str, but: str, pins: identity.Pins, target: Target, open_now: AsyncExitStack) -> Remote:
    """A connection to the coordinator with this key at another place: where the network says it is, or where it was.

    Raises:
        Unreachable: it is at none that is known of.
    """
    heard: list[DiscoveredCoordinator] = []
    with suppress(NotEnough):
        heard = await discovery.look(enough=lambda found: found.fingerprint == key)
    said = [place for found in heard if found.fingerprint == key for place in found.addresses]
    been = [place for place, pinned in pins.all().items() if pinned == key]
    places = [place for place in dict.fromkeys(said + been) if place != but][:_MOST_PLACES]
    if not places:
        raise Unreachable("nobody on this network has the coordinator's key")
    return await _first_that_answers(
        [partial(connect, place, pins, _unasked, key=key, own=target.own, token=target.token) for place in places],
        open_now,
    )


async def _first_that_answers(
    places: Sequence[Callable[[], AbstractAsyncContextManager[Remote]]], open_now: AsyncExitStack
) -> Remote:
    for place in places[:-1]:
        with suppress(Unreachable):
            return await open_now.enter_async_context(place())
    return await open_now.enter_async_context(places[-1]())


def _joined_at(state: Path, job: str) -> str:
    """Where a job (any, if empty) was last joined; empty if this machine has joined none."""
    joined = outbox.all_outboxes(state)
    return next((box.server() for box in joined if not job or box.folder.name.rpartition("-")[0] == job), "")


async def _ask_which(found: Sequence[DiscoveredCoordinator], screen: Screen) -> DiscoveredCoordinator:
    rows = [
        f"  {number}  {each.name} at {each.addresses[0]}, key {tls.grouped(each.fingerprint[:16])} …"
        for number, each in enumerate(found, 1)
    ]
    screen.say(events.SeveralCoordinators("\n".join(rows)))
    while True:
        answer = await screen.ask(f"Which one? \\[1-{len(found)}]")
        if not answer:
            raise UsageError("no coordinator was chosen", hint="add --server HOST:PORT")
        if answer.isdecimal() and 1 <= int(answer) <= len(found):
            return found[int(answer) - 1]
