"""`edge-client discover`: the coordinators on this network."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.connection import discovery
from edge_client.connection.identity import Pins
from edge_client.ui import rows
from edge_client.ui.rows import HeardCoordinator
from edge_client.ui.screen import Screen
from oneround import tls


def discover(
    seconds: Annotated[float, typer.Option(help="How long to listen.", min=0.1, max=600)] = discovery.LOOK_SECONDS,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """The coordinators that make themselves known on this network."""
    with Screen(as_json).busy("listening to this network"):
        coordinators = asyncio.run(discovery.look(seconds))
    pinned = set(Pins(state).all().values())
    heard = [
        HeardCoordinator(
            coordinator.name, coordinator.addresses, coordinator.fingerprint, coordinator.fingerprint in pinned
        )
        for coordinator in coordinators
    ]
    if as_json:
        rows.print_list(heard)
    else:
        _show(heard)


def _show(heard: Sequence[HeardCoordinator]) -> None:
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if not heard:
        out.print(
            "No coordinator makes itself known on this network. One elsewhere: edge-client join --server HOST:PORT"
        )
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "address", "known here", "key fingerprint"):
        table.add_column(heading)
    for row in heard:
        is_known = "yes" if row.known else "no"
        table.add_row(escape(row.name), "\n".join(row.addresses), is_known, tls.grouped(row.fingerprint))
    out.print(table)
    out.print("Compare the fingerprint with the one that `coordinator serve` printed; anybody can use a name.")
