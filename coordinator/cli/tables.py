"""Jobs as people see them in a terminal."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from coordinator import aggregate, events
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

SHOWN_EVENTS = 8  # the newest of a job


def jobs(statuses: Sequence[pb.JobStatus]) -> Table:
    """A line a job."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("job", "state", "base", "clients", "in", "closes", "published"):
        table.add_column(heading)
    for status in statuses:
        table.add_row(
            status.spec.name,
            _word(pb.State.Name(status.state)),
            escape(status.spec.model.base),
            str(status.joined),
            f"{status.admitted} of {status.spec.round.target_clients or status.spec.round.min_clients}",
            _when(status.deadline_unix) if status.takes_contributions else "closed",
            f"v{status.publications[-1].version}" if status.publications else "",
        )
    return table


def line(status: pb.JobStatus) -> Text:
    """One job in a line."""
    spec, state = status.spec, _word(pb.State.Name(status.state))
    closes = f", closes {_when(status.deadline_unix)}" if status.state == pb.STATE_OPEN else ""
    return Text(f"Job {spec.name} is {state}: {spec.model.base}, LoRA rank {spec.lora.rank}{closes}")


def job(status: pb.JobStatus) -> RenderableType:
    """One job at a glance."""
    spec = status.spec
    state = _word(pb.State.Name(status.state))
    reason = f" ({status.reason})" if status.reason else ""
    stage = f": {status.stage}" if status.stage else ""
    lines = [
        f"{spec.name}: {state}{reason}{stage}",
        f"  base      {spec.model.base}",
        f"  adapter   rank {spec.lora.rank}, alpha {spec.lora.alpha:g}, {', '.join(spec.lora.target_modules)}"
        + (", A frozen" if spec.lora.freeze_a else ""),
        *([f"  starts    from {start(status.started_from, spec)}"] if status.HasField("started_from") else []),
        f"  train     {spec.train.epochs:g} epochs, learning rate {spec.train.learning_rate:g}, "
        f"batch {spec.train.batch_size} x {spec.train.max_seq_len} tokens",
        f"  round     {_progress(status)}",
        f"            quorum {spec.round.min_clients}, target {spec.round.target_clients or 'none'}; {_taking(status)}",
        f"  mean      {aggregate.described(spec.aggregate)}",
    ]  # fmt: skip
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if status.clients:
        parts.append(_clients(status.clients))
    else:
        parts.append(Text("  no client has joined yet"))
    parts.extend(_helped(status))
    parts.extend(_events(status.events[-SHOWN_EVENTS:]))
    for publication in status.publications:
        how = f"{publication.contributions} contributions, {aggregate.described(publication.aggregate)}"
        parts.append(Text(f"Published v{publication.version}: {how} ({publication.reason})"))
        parts.append(Text(f"  in {publication.folder}"))
        if publication == status.publications[-1]:
            parts.extend(Text(f"  {file.name}  {human_size(file.size)}") for file in publication.artifacts)
        parts.extend(
            Text(f"  {file.name} is withheld, in {publication.folder}.withheld: {file.reason}")
            for file in publication.withheld
        )
    return Group(*parts)


def _events(newest: Sequence[pb.Event]) -> list[RenderableType]:
    """What happened last: when, to whom, what."""
    if not newest:
        return []
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("when", "who", "what"):
        table.add_column(heading)
    for event in newest:
        at = datetime.fromtimestamp(event.at_unix, UTC).astimezone().strftime("%a %d %b %H:%M:%S")
        table.add_row(at, escape(event.client_name or event.client), escape(events.sentence(event)))
    return [table]


def start(source: pb.Start, spec: pb.JobSpec) -> str:
    """What a job started from, for people."""
    if source.job:
        return f"version {source.version} of {source.job} (manifest {source.digest})"
    return f"{spec.lora.start_from} (adapter {source.digest})"


def reachable_host(address: str) -> str:
    """A host that others can type: this machine's name where the daemon listens on every interface."""
    host = address.rpartition(":")[0]
    return socket.gethostname() if host in ("0.0.0.0", "[::]") else host


def _clients(clients: Sequence[pb.ClientStatus]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("client", "id", "machine", "phase", "steps", "loss", "tokens/s", "examples", "sent", "verdict"):
        table.add_column(heading)
    for client in clients:
        contribution = client.contribution if client.HasField("contribution") else None
        table.add_row(
            escape(client.name),
            client.id,
            escape(f"{client.machine.backend} on {client.machine.device}"),
            _word(pb.Phase.Name(client.phase)),
            f"{client.step}/{client.total_steps}" if client.total_steps else "",
            f"{client.loss:.3f}" if client.total_steps else "",
            f"{client.tokens_per_second:.0f}" if client.total_steps else "",
            str(contribution.declaration.num_examples) if contribution else "",
            human_size(contribution.declaration.size) if contribution else "",
            escape(verdict(contribution)) if contribution else "",
        )
    return table


def verdict(contribution: pb.Contribution) -> str:
    """The verdict on a contribution, and why."""
    judgement = contribution.judgement
    word = _word(pb.Verdict.Name(judgement.verdict)) if judgement.verdict else "pending"
    again = " (may send another)" if contribution.may_replace else ""
    return (f"{word}: {judgement.reason}" if judgement.reason else word) + again


def _helped(status: pb.JobStatus) -> list[RenderableType]:
    """Did the newest version that clients reported on help, and whom."""
    if not status.comparisons:
        return []
    whole = status.comparisons[-1]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"v{whole.version} on held-out data of")
    for heading in ("base", "own adapter", "published", "− base", "− own", "tokens"):
        table.add_column(heading, justify="right")
    for client in status.clients:
        for evaluation in client.evaluations:
            if evaluation.version == whole.version:
                table.add_row(escape(client.name), *_losses(evaluation), f"{evaluation.tokens:,}")
    table.add_section()
    table.add_row(f"mean of {whole.clients}", *_losses(whole), "")
    summary = (
        f"  Loss in nats per token, as clients report it. v{whole.version} is better than the base for "
        f"{whole.better_than_base} of {whole.clients}, and better than what they trained alone for "
        f"{whole.better_than_own} of {whole.clients}."
    )
    return [table, Text(summary)]


def _losses(evaluation: pb.Evaluation | pb.Comparison) -> tuple[str, ...]:
    """Three losses, and how far the published one is from the others: below zero is better."""
    return (
        f"{evaluation.base_loss:.3f}",
        f"{evaluation.own_loss:.3f}",
        f"{evaluation.published_loss:.3f}",
        f"{evaluation.published_loss - evaluation.base_loss:+.3f}",
        f"{evaluation.published_loss - evaluation.own_loss:+.3f}",
    )


def _progress(status: pb.JobStatus) -> str:
    """Who is where, at a glance: `3 of 10 in; 4 training, 2 asleep, 1 uploading`."""
    phases = Counter(client.phase for client in status.clients)
    elsewhere = ", ".join(
        f"{phases[phase]} {_word(pb.Phase.Name(phase))}"
        for phase in (pb.PHASE_TRAINING, pb.PHASE_UPLOADING, pb.PHASE_ASLEEP, pb.PHASE_WITHDRAWN)
        if phases[phase]
    )
    aside = status.contributed - status.admitted
    parts = [f"{status.admitted} in", f"{aside} set aside or pending" if aside else "", elsewhere]
    return "; ".join(part for part in parts if part)


def _taking(status: pb.JobStatus) -> str:
    if status.takes_contributions:
        return f"takes contributions until {_when(status.deadline_unix)}"
    return "takes no more contributions"


def _word(name: str) -> str:
    """`STATE_OPEN` as `open`."""
    return name.split("_", 1)[1].lower()


def _when(unix: float) -> str:
    left = unix - time.time()
    at = datetime.fromtimestamp(unix, UTC).astimezone().strftime("%a %d %b %H:%M")
    if left <= 0:
        return f"{at} (over)"
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if left >= 2 * length:
            return f"{at} (in {left / length:.0f} {unit})"
    return f"{at} (in {left:.0f} s)"
