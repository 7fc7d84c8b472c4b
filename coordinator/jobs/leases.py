"""Who is at work, to the second. Heartbeats, and the events that they and opened uploads tell of, stay in memory and
are written down every few seconds: a crash forgets no more than what clients say again, and a thousand laptops do not
keep the disk busy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from coordinator.events import kind
from coordinator.storage.contributions import judgement
from coordinator.storage.events import NewEvent
from coordinator.storage.schema import Client, Contribution
from coordinator.storage.store import Store
from oneround.errors import OneroundError, UsageError
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb

ASLEEP_AFTER = 60.0  # seconds without a word from a client that is training
BEATS_A_SECOND = 50  # of all clients together


@dataclass
class Lease:
    """One client of one job, as last heard of."""

    client: Client
    last_seen: float
    beat: pb.HeartbeatRequest = field(default_factory=pb.HeartbeatRequest)
    uploading: bool = False  # a stream of it is open
    declaration: pb.Declaration | None = None  # of what it will send
    contributed: bool = False
    judgement: pb.Judgement | None = None  # of its contribution; None: to be looked up
    unwritten: bool = False
    _unrecorded: dict[str, NewEvent] = field(default_factory=dict)  # by kind, in order; each kind once

    def notice(self, event: pb.Event, now: float) -> None:
        """Keep an event until the lease is next written down."""
        self._unrecorded.setdefault(kind(event), NewEvent(event, now, self.client.client_id))
        self.unwritten = True

    @property
    def unrecorded(self) -> list[NewEvent]:
        """The events that are not in the database yet."""
        return list(self._unrecorded.values())

    def recorded(self, happened: Sequence[NewEvent]) -> None:
        """These events are in the database now."""
        for new in happened:
            if self._unrecorded.get(kind(new.event)) is new:
                del self._unrecorded[kind(new.event)]


class Leases:
    """The leases that were heard of since the daemon started; the others are in the store. Methods do not wait."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._by_client: dict[tuple[str, str], Lease] = {}

    def get(self, token: str) -> Lease | None:
        """A lease that is in memory."""
        return self._leases.get(token)

    def hold(self, client: Client, contribution: Contribution | None) -> Lease:
        """Take a client's row and its contribution into memory, or renew what is in memory by them."""
        beat = pb.HeartbeatRequest(
            step=client.step,
            total_steps=client.total_steps,
            loss=client.loss,
            tokens_per_second=client.tokens_per_second,
        )
        lease = self._leases.setdefault(client.lease, Lease(client, client.last_seen, beat))
        lease.client, lease.contributed = client, lease.contributed or contribution is not None
        self._by_client[client.job, client.client_id] = lease
        if contribution is not None:
            self.judged(contribution)
        return lease

    def judged(self, contribution: Contribution) -> None:
        """The verdict on a contribution has changed."""
        if lease := self._by_client.get((contribution.job, contribution.client_id)):
            lease.judgement = judgement(contribution)

    def judged_anew(self, job: str) -> None:
        """A cohort was judged: the verdicts on a job's contributions have to be looked up."""
        for lease in self._leases.values():
            if lease.client.job == job:
                lease.judgement = None

    def heard(self, lease: Lease, beat: pb.HeartbeatRequest | None = None) -> None:
        """Note a sign of life of a client, and how far it is if it says so.

        Raises:
            UsageError: its loss or speed is invalid.
        """
        if beat is not None:
            numbers = (beat.loss, beat.tokens_per_second)
            if not all(math.isfinite(number) and 0 <= number < 1e12 for number in numbers):
                raise UsageError("a heartbeat says a loss or a speed that cannot be")
            if beat.step and not lease.beat.step:
                lease.notice(pb.Event(first_step=pb.FirstStep(total_steps=beat.total_steps)), self._clock())
            lease.beat = beat
        lease.last_seen, lease.unwritten = self._clock(), True

    @property
    def pace(self) -> float:
        """Seconds between two heartbeats of a client: two, or more where there are more than a hundred."""
        return min(max(2.0, len(self._leases) / BEATS_A_SECOND), ASLEEP_AFTER / 3)

    def write_down(self) -> None:
        """Put what was heard into the store; blocks. If that fails, it is put there the next time."""
        unwritten = [lease for lease in list(self._leases.values()) if lease.unwritten]
        for lease in unwritten:
            lease.unwritten = False
        happened = {lease.client.lease: lease.unrecorded for lease in unwritten}
        by_job: dict[str, list[NewEvent]] = {}
        for lease in unwritten:
            by_job.setdefault(lease.client.job, []).extend(happened[lease.client.lease])
        try:
            self._store.record_progress(map(_progress, unwritten), by_job)
        except OneroundError:
            for lease in unwritten:
                lease.unwritten = True
            raise
        for lease in unwritten:
            lease.recorded(happened[lease.client.lease])

    def forget(self, job: str) -> None:
        """A job is gone."""
        for token in [token for token, lease in self._leases.items() if lease.client.job == job]:
            client = self._leases.pop(token).client
            del self._by_client[client.job, client.client_id]

    def statuses(self, clients: Iterator[Client]) -> Iterator[tuple[Client, pb.ClientStatus]]:
        """What operators see of clients, whether or not they were heard of lately."""
        for client in clients:
            lease = self._leases.get(client.lease) or Lease(client, client.last_seen)
            beat = lease.beat if client.lease in self._leases else client
            yield (
                client,
                pb.ClientStatus(
                    id=public_id(client.client_id),
                    name=client.name,
                    machine=client.machine,
                    phase=phase(lease, self._clock()),
                    step=beat.step,
                    total_steps=beat.total_steps,
                    loss=beat.loss,
                    tokens_per_second=beat.tokens_per_second,
                    last_seen_unix=lease.last_seen,
                ),
            )


def _progress(lease: Lease) -> dict[str, object]:
    """A lease as its columns."""
    beat = lease.beat
    return {
        "lease": lease.client.lease,
        "last_seen": lease.last_seen,
        "step": beat.step,
        "total_steps": beat.total_steps,
        "loss": beat.loss,
        "tokens_per_second": beat.tokens_per_second,
    }


def phase(lease: Lease, now: float) -> pb.Phase.ValueType:
    """Where a client stands. One that is silent sleeps; it has not failed."""
    if lease.client.withdrawn:
        return pb.PHASE_WITHDRAWN
    if lease.contributed:
        return pb.PHASE_CONTRIBUTED
    if lease.uploading:
        return pb.PHASE_UPLOADING
    return pb.PHASE_ASLEEP if now - lease.last_seen > ASLEEP_AFTER else pb.PHASE_TRAINING
