"""What Prometheus sees: how calls went, what moved, where every job stands, and what has happened in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator import events
from oneround.v1 import federation_pb2 as pb

CALLS = Histogram(
    "oneround_call_seconds",
    "Time from a call's begin to its answer; streams until their end",
    ["method", "status"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60, 600),
)
UPLOADED = Counter("oneround_uploaded_bytes", "Bytes of contributions taken from clients")
DOWNLOADED = Counter("oneround_downloaded_bytes", "Bytes of artifacts sent to clients")


class Call:
    """A call that is being answered; `status` is what it will have been."""

    def __init__(self) -> None:
        self.status = "OK"


@contextmanager
def timed(method: str) -> Iterator[Call]:
    """Time a call until the block ends."""
    started, call = time.perf_counter(), Call()
    try:
        yield call
    finally:
        CALLS.labels(method, call.status).observe(time.perf_counter() - started)


class Jobs(Collector):
    """Every job's clients by phase, contributions by verdict and events by kind, looked up when Prometheus asks."""

    def __init__(
        self,
        statuses: Callable[[], list[pb.JobStatus]],
        event_counts: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        """`event_counts` gives how many events there were, by job and kind."""
        self._statuses, self._event_counts = statuses, event_counts

    def collect(self) -> Iterator[Metric]:
        statuses, counts = self._statuses(), self._event_counts()
        yield from _standing(statuses)
        happened = CounterMetricFamily("oneround_events", "What has happened in a job's round", labels=["job", "kind"])
        for status in statuses:
            for kind in events.KINDS:
                happened.add_metric([status.spec.name, kind], counts.get((status.spec.name, kind), 0))
        yield happened


def _standing(statuses: Iterable[pb.JobStatus]) -> list[Metric]:
    """Where jobs stand now."""
    state = GaugeMetricFamily("oneround_job_state", "1 for the state that a job is in", labels=["job", "state"])
    clients = GaugeMetricFamily("oneround_clients", "Clients of a job", labels=["job", "phase"])
    contributions = GaugeMetricFamily("oneround_contributions", "Contributions to a job", labels=["job", "verdict"])
    version = GaugeMetricFamily("oneround_version", "A job's newest publication; 0: none", labels=["job"])
    for status in statuses:
        name = status.spec.name
        for possible in pb.State.values()[1:]:
            state.add_metric([name, _word(pb.State.Name(possible))], float(status.state == possible))
        for phase in pb.Phase.values()[1:]:
            count = sum(client.phase == phase for client in status.clients)
            clients.add_metric([name, _word(pb.Phase.Name(phase))], count)
        verdicts = [
            client.contribution.judgement.verdict for client in status.clients if client.HasField("contribution")
        ]
        for verdict in pb.Verdict.values()[1:]:
            contributions.add_metric([name, _word(pb.Verdict.Name(verdict))], verdicts.count(verdict))
        version.add_metric([name], status.publications[-1].version if status.publications else 0)
    return [state, clients, contributions, version]


@contextmanager
def served(host: str, port: int, jobs: Jobs) -> Iterator[int]:
    """Serve metrics over HTTP until the block ends; yields the port.

    Raises:
        OSError: the address cannot be bound.
    """
    REGISTRY.register(jobs)
    try:
        http, thread = start_http_server(port, host)
        try:
            yield http.server_port
        finally:
            http.shutdown()
            http.server_close()
            thread.join()
    finally:
        REGISTRY.unregister(jobs)


def _word(name: str) -> str:
    """`STATE_OPEN` as `open`."""
    return name.split("_", 1)[1].lower()
