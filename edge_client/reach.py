"""Which coordinator is meant, and a connection to it: the named one, the one of before wherever it is now, or the only
one on this network."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import click
import typer

from converters.errors import NotEnough, Unreachable, UsageError
from edge_client import discovery, identity, outbox
from edge_client.discovery import Found
from edge_client.remote import Remote, connect
from edge_client.screen import Screen
from oneround import tls


@asynccontextmanager
async def connected(
    server: str, state: Path, screen: Screen, insecure: bool, job: str = "", *, pin: bool = True
) -> AsyncIterator[Remote]:
    """A connection to the named coordinator; or to the one that the job (or the last job) was joined at, wherever it is
    now; or to the one on this network. With `pin` the key of one that was never seen before is pinned."""

    def on_first_use(address: str, fingerprint: str) -> None:
        screen.say("pinned", server=address, fingerprint=tls.grouped(fingerprint))

    pins = identity.Pins(state, keep=pin)
    places = [server or _joined_at(state, job)]
    if not places[0]:
        if insecure:  # who makes itself known speaks TLS
            raise UsageError("which coordinator?", hint="add --server HOST:PORT, as `coordinator serve` prints it")
        with screen.busy("looking for a coordinator on this network"):
            found = await discovery.look()
        chosen = discovery.only(found) if len(found) < 2 or not sys.stdin.isatty() else _ask_which(found)
        screen.say("found", name=chosen.name, server=chosen.addresses[0])
        places = list(chosen.addresses)
    async with AsyncExitStack() as open_now:
        try:
            remote = await _first_that_answers(
                [partial(connect, place, pins, on_first_use, insecure=insecure) for place in places], open_now
            )
        except Unreachable:
            key = pins.all().get(places[0])
            if insecure or key is None:
                raise
            moved: list[Found] = []
            with screen.busy("looking for the coordinator on this network"), suppress(NotEnough):
                moved = await discovery.look(enough=lambda found: found.fingerprint == key)
            elsewhere = [place for found in moved if found.fingerprint == key for place in found.addresses]
            if not set(elsewhere) - set(places):
                raise
            remote = await _first_that_answers(
                [partial(connect, place, pins, on_first_use, key=key) for place in elsewhere], open_now
            )
            screen.say("moved", before=places[0], server=remote.server)
        yield remote


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


def _ask_which(found: Sequence[Found]) -> Found:
    print("Several coordinators make themselves known on this network:")
    for index, each in enumerate(found, 1):
        print(f"  {index}  {each.name}  {each.addresses[0]}  {tls.grouped(each.fingerprint[:16])} …")
    number = int(typer.prompt("Which one", type=click.IntRange(1, len(found))))
    return found[number - 1]
