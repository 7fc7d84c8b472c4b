"""Many streams, little memory: only so many wait for their next message at a time.

A stream that waits for a message lets gRPC take all of it from the wire into memory; one that does not is held back by
flow control. Without turns, five hundred uploads at once would hold five hundred chunks, and everything else that
clients say would queue behind them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from converters.errors import Interrupted

Message = TypeVar("Message")

TURNS = 24  # chunks of up to 1 MiB
PATIENCE = 10.0  # seconds for a message while others wait: half a megabyte at 400 kbit/s
IDLE = 60.0  # seconds for a message while nobody else waits


class Turns:
    """Hands out turns in the order in which they were asked for."""

    def __init__(self, turns: int = TURNS, patience: float = PATIENCE, idle: float = IDLE) -> None:
        self._free = asyncio.Semaphore(turns)
        self._waiting = 0
        self._patience = patience
        self._idle = idle

    async def next(self, messages: AsyncIterator[Message]) -> Message | None:
        """A stream's next message, or None at its end.

        Raises:
            Interrupted: it is too slow; what came so far stays, and the stream may be taken up again.
        """
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        reading = asyncio.ensure_future(anext(messages, None))
        try:
            waited = 0.0
            while not reading.done():
                await asyncio.wait({reading}, timeout=self._patience)
                waited += self._patience
                if not reading.done() and (self._waiting or waited >= self._idle):
                    raise Interrupted("nothing came for a while, and an upload must not keep others out; go on later")
            return reading.result()
        finally:
            reading.cancel()
            self._free.release()
