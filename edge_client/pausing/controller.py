"""Training as a guest on somebody's machine: it looks how things stand, pauses between two steps, and goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

from edge_client.pausing import policy, sensors
from edge_client.pausing.policy import Pause, PausePolicy, Readings, Reason
from edge_client.ui import events
from edge_client.ui.screen import Screen

LOOK_SECONDS = 5.0
_STOP_SECONDS = 0.1  # within which a pause ends when training is to stop

Stopped = Callable[[], object]  # whether training is to stop altogether
Release = Callable[[], None]


class PauseController:
    """Keeps to a person's pause policy. `read` and `keep_awake` are the machine, or a test's."""

    def __init__(
        self,
        pause_policy: PausePolicy = PausePolicy(),  # noqa: B008  frozen
        *,
        read: Callable[[], Readings] | None = None,
        keep_awake: Callable[[], Release] = sensors.keep_awake,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._policy = pause_policy
        self._read = read or partial(sensors.read, idle=pause_policy.idle)
        self._keep_awake = keep_awake
        self._look_seconds = look_seconds
        self._screen = Screen()
        self._pause: Pause | None = None
        self._release: Release | None = None
        self._waited: tuple[float, float | None] = (0.0, None)  # seconds of pauses that are over; since when it waits

    @property
    def pauses(self) -> bool:
        """Whether training should wait now."""
        return self._pause is not None

    def clock(self) -> float:
        """Seconds of a clock that stands still while training waits."""
        over, since = self._waited
        return (time.monotonic() if since is None else since) - over

    @asynccontextmanager
    async def watching(self, screen: Screen) -> AsyncIterator[None]:
        """Look at the machine every few seconds, off the training thread; keep it awake but for pauses."""
        self._screen, self._pause = screen, None
        await self._look()
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._let_sleep()

    async def ready(self, stopped: Stopped) -> None:
        """Wait until training may begin, or is to stop."""
        gone = False
        try:
            await asyncio.to_thread(self.wait, lambda: gone or stopped())
        except asyncio.CancelledError:
            gone = True  # a thread only ends by itself
            raise

    def wait(self, stopped: Stopped) -> None:
        """Hold the training thread until it may go on, or is to stop."""
        if self._pause is not None:
            with self._waiting():
                while self._pause is not None and not stopped():
                    time.sleep(_STOP_SECONDS)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began, (over, _) = time.monotonic(), self._waited
        self._waited = (over, began)
        if self._pause is not None:
            self._tell(self._pause.reason)
        try:
            yield
        finally:
            self._waited = (over + time.monotonic() - began, None)
        if self._pause is None:
            self._screen.say(events.TrainingUnpaused(time.monotonic() - began))

    def _tell(self, reason: Reason) -> None:
        self._screen.say(events.TrainingPaused(reason.kind, reason.why, reason.until))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            with suppress(OSError):  # what cannot be read now is read the next time
                await self._look()

    async def _look(self) -> None:
        readings = await asyncio.to_thread(self._read)
        before, self._pause = self._pause, policy.decide(readings, self._policy, self._pause, time.monotonic())
        if self._pause is not None:
            self._let_sleep()
            if self._waited[1] is not None and before and before.reason.kind != self._pause.reason.kind:
                self._tell(self._pause.reason)
        elif self._release is None:
            self._release = self._keep_awake()

    def _let_sleep(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None
