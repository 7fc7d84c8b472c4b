"""Which coordinator is meant, and a connection to it: the named one, the one of before wherever it is now, or the only
one on this network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from converters.errors import NotEnough, OneroundError, Unreachable, UsageError
from edge_client import discovery, identity, outbox
from edge_client.discovery import Found
from edge_client.remote import Remote, answers, connect
from edge_client.screen import Screen
from oneround import invitation, tls
from oneround.invitation import Invitation

_MOST_PLACES = 8  # that are tried; anybody on the network can say anything


class Roaming(Remote):
    """A connection to the coordinator with a key, wherever it is."""

    def __init__(
        self, first: Remote, pins: identity.Pins, state: Path, screen: Screen, open_now: AsyncExitStack
    ) -> None:
        self.go_on_over(first)
        self._key = tls.fingerprint(first.certificate)
        self._pins, self._state, self._screen, self._open_now = pins, state, screen, open_now
        self._looking = asyncio.Lock()

    async def find_again(self, lost: str) -> bool:
        """Look for it where the network says it is, and where it has been before.

        A place that still answers is kept: gRPC connects there again by itself, also when this machine's own address
        has changed. Connections that were left stay open until the end, for calls that are still on them.
        """
        async with self._looking:
            if self.server != lost:
                return True
            if await answers(self.server, self._key):
                return False
            with suppress(OneroundError):
                other = await _elsewhere(self._key, self.server, self._pins, self._open_now)
                self.go_on_over(other)
                self._screen.say("moved", before=lost, server=other.server)
                outbox.moved(self._state, lost, other.server)
            return self.server != lost


@asynccontextmanager
async def connected(
    server: str,
    state: Path,
    screen: Screen,
    insecure: bool,
    job: str = "",
    *,
    pin: bool = True,
) -> AsyncIterator[Remote]:
    """A connection to the named coordinator; or to the one that the job (or the last job) was joined at, wherever it is
    now; or to the one on this network. With `pin` the key of one that was never seen before is pinned. In place of its
    address, `server` may be an invitation, which also says whose key has to answer, and brings a token."""

    def on_first_use(address: str, fingerprint: str) -> None:
        screen.say("pinned", server=address, fingerprint=tls.grouped(fingerprint))

    pins = identity.Pins(state, keep=pin)
    invited = _invitation(server)
    server = invited.server
    places = [server or _joined_at(state, job)]
    if not places[0]:
        if insecure:  # who makes itself known speaks TLS
            raise UsageError("which coordinator?", hint="add --server HOST:PORT, as `coordinator serve` prints it")
        with screen.busy("looking for a coordinator on this network"):
            found = await discovery.look()
        chosen = await _ask_which(found, screen) if len(found) > 1 and screen.can_ask else discovery.only(found)
        screen.say("found", name=chosen.name, server=chosen.addresses[0])
        places = list(chosen.addresses)
    async with AsyncExitStack() as open_now:
        try:
            remote = await _first_that_answers(
                [
                    partial(
                        connect,
                        place,
                        pins,
                        on_first_use,
                        key=invited.fingerprint,
                        insecure=insecure,
                        token=invited.token,
                    )
                    for place in places
                ],
                open_now,
            )
        except Unreachable as nobody:
            key = pins.all().get(places[0])
            if insecure or key is None:
                raise
            with screen.busy("looking for the coordinator on this network"):
                try:
                    remote = await _elsewhere(key, places[0], pins, open_now)
                except Unreachable:
                    raise nobody from None
            screen.say("moved", before=places[0], server=remote.server)
            outbox.moved(state, places[0], remote.server)
        yield remote if insecure else Roaming(remote, pins, state, screen, open_now)


async def _elsewhere(key: str, but: str, pins: identity.Pins, open_now: AsyncExitStack) -> Remote:
    """A connection to the coordinator with this key at another place: where the network says it is, or where it was.

    Raises:
        Unreachable: it is at none that is known of.
    """
    heard: list[Found] = []
    with suppress(NotEnough):
        heard = await discovery.look(enough=lambda found: found.fingerprint == key)
    said = [place for found in heard if found.fingerprint == key for place in found.addresses]
    been = [place for place, pinned in pins.all().items() if pinned == key]
    places = [place for place in dict.fromkeys(said + been) if place != but][:_MOST_PLACES]
    if not places:
        raise Unreachable("nobody on this network has the coordinator's key")
    return await _first_that_answers(
        [partial(connect, place, pins, lambda *_: None, key=key) for place in places], open_now
    )


async def _first_that_answers(
    places: Sequence[Callable[[], AbstractAsyncContextManager[Remote]]], open_now: AsyncExitStack
) -> Remote:
    for place in places[:-1]:
        with suppress(Unreachable):
            return await open_now.enter_async_context(place())
    return await open_now.enter_async_context(places[-1]())


def _invitation(server: str) -> Invitation:
    """What an invitation says; of a plain address that it is one.

    Raises:
        UsageError: it would be an invitation, and is none.
    """
    if not server.startswith(invitation.SCHEME):
        return Invitation(server)
    try:
        return invitation.read(server)
    except ValueError as error:
        raise UsageError(str(error), hint="paste the whole line, in quotes") from error


def _joined_at(state: Path, job: str) -> str:
    """Where a job (any, if empty) was last joined; empty if this machine has joined none."""
    joined = outbox.all_outboxes(state)
    return next((box.server() for box in joined if not job or box.folder.name.rpartition("-")[0] == job), "")


async def _ask_which(found: Sequence[Found], screen: Screen) -> Found:
    rows = [
        f"  {number}  {each.name} at {each.addresses[0]}, key {tls.grouped(each.fingerprint[:16])} …"
        for number, each in enumerate(found, 1)
    ]
    screen.say("several", rows="\n".join(rows))
    while True:
        answer = await screen.ask(f"Which one? \\[1-{len(found)}]")
        if not answer:
            raise UsageError("no coordinator was chosen", hint="add --server HOST:PORT")
        if answer.isdecimal() and 1 <= int(answer) <= len(found):
            return found[int(answer) - 1]
