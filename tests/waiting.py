"""Waiting for what will come, for as long as a machine with much other work may take over it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable

LONG = 300.0  # seconds; a test is given up after 600
_PAUSE = 0.02  # seconds between two looks


def eventually(true: Callable[[], object], seconds: float = LONG) -> bool:
    """Whether this comes true before so many seconds are over."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


async def until(true: Callable[[], object], seconds: float = LONG) -> None:
    """Go on as soon as this, or what it is awaited for, is true.

    Raises:
        TimeoutError: it was not, for so many seconds.
    """
    async with asyncio.timeout(seconds):
        while True:
            answer = true()
            if await answer if inspect.isawaitable(answer) else answer:
                return
            await asyncio.sleep(_PAUSE)
