"""What a job looks like from outside: in outline for everybody, whole for its operator; and who watches it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

from coordinator import round as rounds
from coordinator.jobs import evaluations
from coordinator.jobs.leases import Leases
from coordinator.storage.contributions import judgement
from coordinator.storage.publications import version_folder
from coordinator.storage.schema import Contribution
from coordinator.storage.store import Store
from oneround.v1 import federation_pb2 as pb

LOOK_AGAIN = 5.0  # seconds; a deadline passes, and nothing tells of it
NEWEST_EVENTS = 200  # that a whole status has


class Statuses:
    """Puts statuses together, once for however many watch."""

    def __init__(self, store: Store, leases: Leases, publications: Path, clock: Callable[[], float]) -> None:
        self._store = store
        self._leases = leases
        self._publications = publications
        self._clock = clock
        self._stages: dict[str, str] = {}
        self._outlines: dict[str, pb.JobStatus] = {}
        self._changed = asyncio.Condition()

    async def changed(self, name: str) -> None:
        """Something other than a heartbeat happened to a job."""
        async with self._changed:
            self._outlines.pop(name, None)
            self._changed.notify_all()

    async def stage(self, name: str, stage: str) -> None:
        """Say what the publisher is doing; empty: nothing."""
        self._stages[name] = stage
        await self.changed(name)

    def outline(self, name: str) -> pb.JobStatus:
        """A job without its clients."""
        announced, round, counts = self._store.announced(name), self._store.round(name), self._store.counts(name)
        publications = self._store.publications(name)
        for publication in publications:
            publication.folder = str(version_folder(self._publications.parent, name, publication.version))
        status = pb.JobStatus(
            spec=announced.job.spec,
            state=pb.State.Value(f"STATE_{round.state.upper()}"),
            reason=round.reason,
            opened_unix=announced.opened,
            deadline_unix=round.rules.deadline,
            publications=publications,
            stage=self._stages.get(name, ""),
            joined=counts.joined,
            contributed=counts.contributed,
            admitted=counts.admitted,
            takes_contributions=rounds.takes_contributions(round, self._clock()),
        )
        if announced.job.HasField("started_from"):
            status.started_from.CopyFrom(announced.job.started_from)
        return status

    def whole(self, name: str, *, events: int = NEWEST_EVENTS) -> pb.JobStatus:
        """A job with everybody who joined, what they contributed, and its newest so many events."""
        status = self.outline(name)
        by_client = {contribution.client_id: contribution for contribution in self._store.contributions(name)}
        reported = self._store.evaluations(name)
        for client, shown in self._leases.statuses(iter(self._store.clients(name))):
            contribution = by_client.get(client.client_id)
            if contribution is not None:
                shown.contribution.CopyFrom(_shown(contribution))
                if shown.phase != pb.PHASE_WITHDRAWN:
                    shown.phase = pb.PHASE_CONTRIBUTED
                shown.step = shown.total_steps = min(contribution.declaration.steps, (1 << 32) - 1)
                shown.loss = contribution.declaration.train_loss
            shown.evaluations.extend(reported.get(client.client_id, ()))
            status.clients.append(shown)
        status.comparisons.extend(evaluations.compare(status.clients))
        status.events.extend(self._store.newest_events(name, events) if events else ())
        return status

    async def watch(self, name: str) -> AsyncIterator[pb.JobStatus]:
        """A job's outline, now and whenever it changes."""
        last = None
        while True:
            async with self._changed:
                status = self._outlines.get(name)
                if status is None:
                    status = self._outlines[name] = await asyncio.to_thread(self.outline, name)
                if status == last:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), LOOK_AGAIN)
                        continue
                    self._outlines.pop(name, None)
                    continue
            yield status
            last = status


def _shown(contribution: Contribution) -> pb.Contribution:
    return pb.Contribution(
        declaration=contribution.declaration,
        judgement=judgement(contribution),
        received_unix=contribution.received,
        may_replace=contribution.may_replace,
    )
