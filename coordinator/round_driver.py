"""Drives rounds: applies a trigger, commits what follows, tells who watches, and has versions made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from coordinator import round as rounds
from coordinator.jobs.leases import Leases
from coordinator.jobs.status import Statuses
from coordinator.publication.scheduler import PublicationScheduler
from coordinator.round import Round, State
from coordinator.storage.store import Store
from oneround.v1 import federation_pb2 as pb

log = structlog.get_logger()
offload = asyncio.to_thread


class RoundDriver:
    """Every round as the loop or the last trigger left it, half a second ago at most."""

    def __init__(
        self,
        store: Store,
        leases: Leases,
        statuses: Statuses,
        scheduler: PublicationScheduler,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._leases, self._statuses = store, leases, statuses
        self._scheduler, self._clock = scheduler, clock
        self._rounds: dict[str, Round] = {}

    async def current(self, name: str) -> Round:
        """Raises NotFound when there is no such job."""
        if name not in self._rounds:
            self._rounds[name] = await offload(self._store.round, name)
        return self._rounds[name]

    async def advance(self, name: str, trigger: rounds.Trigger, request: pb.PublishRequest | None = None) -> Round:
        """Apply a trigger to a job's round; returns the round after it."""
        before, after = await offload(self._store.advance, name, trigger, self._clock(), request)
        self._rounds[name] = after
        if after.state != before.state:
            log.info("round", job=name, state=after.state.value, reason=after.reason)
        await self._statuses.changed(name)
        if after.state is State.PUBLISHING:
            self._scheduler.start(name, self._published, self._failed)
        return after

    async def renew(self, name: str, reason: str) -> None:
        """Let a decision by hand show at once: where something is published, a new version is made."""
        round = await offload(self._store.round, name)
        if round.version:
            await self.advance(name, rounds.PublishByHand(reason))

    async def tick(self) -> None:
        """Look at the clock: close rounds that are due, and publish what is closed."""
        for name, round in (await offload(self._store.rounds)).items():
            self._rounds[name] = round
            if round.state is State.PUBLISHING:
                self._scheduler.start(name, self._published, self._failed)
            elif rounds.apply(round, rounds.Tick(), self._clock()) != round:
                await self.advance(name, rounds.Tick())

    def forget(self, name: str) -> None:
        """A job is gone."""
        self._rounds.pop(name, None)

    async def _published(self, name: str, round: Round) -> None:
        self._rounds[name] = round
        self._leases.judged_anew(name)

    async def _failed(self, name: str, reason: str) -> None:
        await self.advance(name, rounds.PublishingFailed(reason))
