"""`edge-client leave`: take back what was sent."""

from __future__ import annotations

import asyncio

from edge_client import outbox
from edge_client.cli.options import DEFAULT_STATE, Job, Json, State
from edge_client.cli.spread import spread
from edge_client.connection import connect
from edge_client.connection.target import ANY, Target
from edge_client.ui import events
from edge_client.ui.screen import Screen


@spread
def leave(job: Job, target: Target = ANY, state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Take part no more: what was sent is left out of everything that is published from now on."""
    screen = Screen(as_json)
    box = outbox.find(state, job)
    joined = box.joined()
    assert joined is not None, "find looks at joined jobs"

    async def withdraw() -> None:
        async with connect.connected(target, state, screen, job) as remote:
            await remote.withdraw(joined.lease)

    asyncio.run(withdraw())
    box.keep_left()
    screen.say(events.Left(job))
