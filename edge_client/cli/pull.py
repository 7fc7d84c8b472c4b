"""`edge-client pull`: fetch what was published."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from edge_client.cli.options import DEFAULT_STATE, Job, Json, State, Version
from edge_client.cli.spread import spread
from edge_client.connection import connect
from edge_client.connection.identity import Pins
from edge_client.connection.target import ANY, Target
from edge_client.results import pull as pulling
from edge_client.ui import events
from edge_client.ui.screen import Screen


@spread
def pull(
    job: Job,
    artifact: Annotated[
        str,
        typer.Option(
            help="A file or folder of the publication, or `all`. Left out: the most precise merged GGUF that fits "
            "comfortably in this machine's memory."
        ),
    ] = "",
    to: Annotated[Path | None, typer.Option(help="Where to put it.", show_default="a folder of the job's name")] = None,
    version: Version = 0,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Take a version that is not signed, as one of an earlier oneround.")
    ] = False,
    target: Target = ANY,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Fetch what was published, as its coordinator has signed it; interrupted, it goes on where it was."""
    screen = Screen(as_json)
    folder = to or Path(job)

    async def fetch() -> None:
        async with connect.connected(target, state, screen, job) as remote:
            publication = pulling.publication(await remote.job(job), version)
            artifacts = pulling.wanted(publication, artifact, screen)
            await pulling.check(remote, job, publication, folder, Pins(state), screen, unsigned=unsigned)
            await pulling.fetch(remote, job, artifacts, folder, screen)

    asyncio.run(fetch())
    screen.say(events.PulledInto(str(folder)))
