"""Who is at work, to the second. Heartbeats stay in memory and are written down every few seconds: a crash forgets no
more than where a training stood, and a thousand laptops do not keep the disk busy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coordinator.storage.schema import Client, Contribution
from coordinator.storage.store import Store
from oneround.errors import UsageError
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


class Leases:
    """The leases that were heard of since the daemon started; the others are in the store. Methods do not wait."""

    def __init__(self, known: Store, clock: Callable[[], float]) -> None:
        self._store = known
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._by_client: dict[tuple[str, str], Lease] = {}

    def get(self, token: str) -> Lease | None:
        """A lease that is in memory."""
        return self._leases.get(token)

    def hold(self, client: Client, given: Contribution | None) -> Lease:
        """Take a client's row and what it gave into memory, or renew what is there by it."""
        beat = pb.HeartbeatRequest(
            step=client.step,
            total_steps=client.total_steps,
            loss=client.loss,
            tokens_per_second=client.tokens_per_second,
        )
        lease = self._leases.setdefault(client.lease, Lease(client, client.last_seen, beat))
        lease.client, lease.contributed = client, lease.contributed or given is not None
        self._by_client[client.job, client.client_id] = lease
        if given is not None:
            self.judged(given)
        return lease

    def judged(self, given: Contribution) -> None:
        """What is made of a contribution has changed."""
        if lease := self._by_client.get((given.job, given.client_id)):
            lease.judgement = judgement(given)

    def judged_anew(self, job: str) -> None:
        """A cohort was judged: what is made of a job's contributions has to be looked up."""
        for lease in self._leases.values():
            if lease.client.job == job:
                lease.judgement = None

    def heard(self, lease: Lease, beat: pb.HeartbeatRequest | None = None) -> None:
        """A client gave a sign of life, and may have said how far it is.

        Raises:
            UsageError: what it says cannot be.
        """
        if beat is not None:
            numbers = (beat.loss, beat.tokens_per_second)
            if not all(math.isfinite(number) and 0 <= number < 1e12 for number in numbers):
                raise UsageError("a heartbeat says a loss or a speed that cannot be")
            lease.beat = beat
        lease.last_seen, lease.unwritten = self._clock(), True

    @property
    def pace(self) -> float:
        """Seconds between two heartbeats of a client: two, or more where there are more than a hundred."""
        return min(max(2.0, len(self._leases) / BEATS_A_SECOND), ASLEEP_AFTER / 3)

    def write_down(self) -> None:
        """Put what was heard into the store; blocks."""
        unwritten = [(token, lease) for token, lease in list(self._leases.items()) if lease.unwritten]
        for _, lease in unwritten:
            lease.unwritten = False
        self._store.note(
            {
                "lease": token,
                "last_seen": lease.last_seen,
                "step": lease.beat.step,
                "total_steps": lease.beat.total_steps,
                "loss": lease.beat.loss,
                "tokens_per_second": lease.beat.tokens_per_second,
            }
            for token, lease in unwritten
        )

    def forget(self, job: str) -> None:
        """A job is gone."""
        for token in [token for token, lease in self._leases.items() if lease.client.job == job]:
            client = self._leases.pop(token).client
            del self._by_client[client.job, client.client_id]

    def statuses(self, clients: Iterator[Client]) -> Iterator[tuple[Client, pb.ClientStatus]]:
        """What operators see of clients, whether they were heard of lately or not."""
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


def judgement(given: Contribution) -> pb.Judgement:
    """A contribution's verdict, as it goes over the wire."""
    verdict = pb.Verdict.Value(f"VERDICT_{given.verdict.upper()}")
    return pb.Judgement(verdict=verdict, reason=given.reason, by_hand=bool(given.by_hand))


def phase(lease: Lease, now: float) -> pb.Phase.ValueType:
    """Where a client stands. One that is silent sleeps; it has not failed."""
    if lease.client.withdrawn:
        return pb.PHASE_WITHDRAWN
    if lease.contributed:
        return pb.PHASE_CONTRIBUTED
    if lease.uploading:
        return pb.PHASE_UPLOADING
    return pb.PHASE_ASLEEP if now - lease.last_seen > ASLEEP_AFTER else pb.PHASE_TRAINING


def public_id(client_id: str) -> str:
    """A client as people name it: the first twelve hex digits of its id."""
    return client_id[:12]
