"""Many streams, little memory: only so many messages are on their way at a time, from the wire to the disk.

A stream that waits for a message lets gRPC take all of it from the wire into memory; one that does not is held back by
flow control. Without turns, five hundred uploads at once would hold five hundred chunks and more, and everything else
that clients say would queue behind them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from oneround.errors import Interrupted

Message = TypeVar("Message")

TURNS = 8  # chunks of up to 1 MiB
PATIENCE = 10.0  # seconds for a message while others wait: half a megabyte at 400 kbit/s
IDLE = 60.0  # seconds for a message while nobody else waits


class FlowControl:
    """Hands out turns in the order in which they were asked for."""

    def __init__(self, turns: int = TURNS, patience: float = PATIENCE, idle: float = IDLE) -> None:
        self._free = asyncio.Semaphore(turns)
        self._waiting = 0
        self._patience = patience
        self._idle = idle

    async def next(self, messages: AsyncIterator[Message]) -> Message | None:
        """A stream's next message, or None at its end. The message keeps its turn until `done`.

        Raises:
            Interrupted: it is too slow; what came so far stays, and the stream may be taken up again.
        """
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        reading = asyncio.ensure_future(anext(messages, None))
        message: Message | None = None
        try:
            waited = 0.0
            while not reading.done():
                await asyncio.wait({reading}, timeout=self._patience)
                waited += self._patience
                if not reading.done() and (self._waiting or waited >= self._idle):
                    raise Interrupted("nothing came for a while, and an upload must not keep others out; go on later")
            message = reading.result()
        finally:
            reading.cancel()
            if message is None:
                self._free.release()
        return message

    def done(self) -> None:
        """A message is out of memory."""
        self._free.release()


class PacedStream(Generic[Message]):
    """One stream's messages, each in its turn. As long as nobody knows whose stream it is, its first message is a
    stranger's and waits apart, so that strangers keep none but each other waiting."""

    def __init__(self, messages: AsyncIterator[Message], first: FlowControl, others: FlowControl) -> None:
        self._messages = messages
        self._turns, self._others = first, others
        self._held: deque[FlowControl] = deque()
        self._peeked: Message | None = None

    async def peek(self) -> Message | None:
        """The next message, which stays the next one; or None at the end."""
        if self._peeked is None:
            self._peeked = await self.next()
        return self._peeked

    async def next(self) -> Message | None:
        """The next message, or None at the end; raises Interrupted when the stream is too slow."""
        peeked, self._peeked = self._peeked, None
        if peeked is not None:
            return peeked
        message = await self._turns.next(self._messages)
        if message is not None:
            self._held.append(self._turns)
            self._turns = self._others
        return message

    async def ends(self) -> bool:
        """Whether nothing more comes within a second."""
        reading = asyncio.ensure_future(anext(self._messages, None))
        done, _ = await asyncio.wait({reading}, timeout=1.0)
        reading.cancel()
        return not done or reading.result() is None

    def written(self, messages: int) -> None:
        """So many, the oldest, are out of memory."""
        for _ in range(messages):
            self._held.popleft().done()

    def close(self) -> None:
        """Give back every turn."""
        self.written(len(self._held))
