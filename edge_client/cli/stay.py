"""`edge-client stay`: take part by itself in every accepted job."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AbstractAsyncContextManager

from edge_client.cli import agreement, options
from edge_client.cli.options import DEFAULT_STATE, UNATTENDED, Json, State, TrainingOptions, WatchOptions, Yes
from edge_client.cli.spread import spread
from edge_client.connection import connect
from edge_client.connection.remote import Remote
from edge_client.connection.target import ANY, Target
from edge_client.ui.screen import Screen
from edge_client.unattended.watch import JobWatcher


@spread
def stay(
    watch: WatchOptions,
    target: Target = ANY,
    training: TrainingOptions = UNATTENDED,
    yes: Yes = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Stay, and take part once in every accepted job as it appears. Ends with Ctrl-C."""
    screen = Screen(as_json)
    watch.require_names()
    training.require_data()
    options.make_folder(state)
    training.give_way()
    participant = training.participant(state, screen)

    def open_connection() -> AbstractAsyncContextManager[Remote]:
        return connect.connected(target, state, screen)

    async def watch_jobs() -> None:
        await agreement.for_every_job(participant, watch.accept, target.address, screen, yes)
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # a service is ended by it
        await JobWatcher(open_connection, watch.accept, participant, screen, look_seconds=watch.look_every).stay()

    asyncio.run(watch_jobs())
