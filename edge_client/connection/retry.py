"""Patience with a coordinator that does not answer: again, more and more slowly, and elsewhere, until the deadline."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from edge_client.connection.remote import OnBytes, Remote
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.errors import Unreachable

LONGEST_PAUSE = 60.0  # seconds between two tries
LOST_AFTER = 2  # tries in a row that nobody answered; then it is looked for elsewhere
SAY_AGAIN = 300.0  # seconds after which the same trouble is told again

Result = TypeVar("Result")


def pauses() -> Iterator[float]:
    """Seconds to wait before one more try: twice as long each time, and by chance, so that a cohort does not come back
    at once."""
    pause = 1.0
    while True:
        yield min(pause * random.uniform(0.5, 1.5), LONGEST_PAUSE)
        pause = min(2 * pause, LONGEST_PAUSE)


async def through(
    remote: Remote,
    deadline: float,
    screen: Screen,
    transfer: Callable[[OnBytes], Awaitable[Result]],
    on_bytes: OnBytes = lambda done: None,
) -> Result:
    """What a transfer gives, however often it has to be taken up; `deadline` in seconds since the Unix epoch.

    Raises:
        Unreachable: the deadline has passed.
    """
    waits, failures = pauses(), 0
    last_error, last_error_at = "", 0.0

    def across(done: int) -> None:
        nonlocal waits, failures
        if failures:
            waits, failures = pauses(), 0
        on_bytes(done)

    while True:
        place = remote.server
        try:
            return await transfer(across)
        except Unreachable as error:
            if time.time() > deadline:
                raise
            failures += 1
            if failures >= LOST_AFTER and await remote.find_again(place):
                continue
            wait = next(waits)
            if str(error) != last_error or time.monotonic() - last_error_at > SAY_AGAIN:
                last_error, last_error_at = str(error), time.monotonic()
                screen.say(events.Retry(last_error, wait))
            await asyncio.sleep(wait)
