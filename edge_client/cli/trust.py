"""`edge-client trust`: pin a coordinator's key by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.connection import tls_probe
from edge_client.connection.identity import Pins
from edge_client.connection.target import Target
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import tls


def trust(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the coordinator is.")],
    fingerprint: Annotated[
        list[str], typer.Argument(metavar="FINGERPRINT", help="Its key, as `coordinator serve` prints it over there.")
    ],
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Pin a coordinator's key: the first time, or in the place of another one after it was set up anew."""
    tls_probe.host_and_port(address)
    key, pins, screen = Target(address, "".join(fingerprint)).trusted, Pins(state), Screen(as_json)
    before = pins.all().get(address, "")
    pins.pin(address, key)
    if before and before != key:
        screen.say(events.Unpinned(address, tls.grouped(before)))
    screen.say(events.Trusted(address, tls.grouped(key)))
