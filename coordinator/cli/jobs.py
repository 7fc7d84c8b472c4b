"""`coordinator submit`, `show`, `close`, `publish` and the other commands about jobs and contributions."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from coordinator.aggregate import METHODS
from coordinator.cli import client as control
from coordinator.cli import tables
from coordinator.cli.output import DEFAULT_STATE, Json, State, Why, out, print_json
from coordinator.jobs import spec as jobs_
from coordinator.publication import diff as diffs
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb

commands = typer.Typer()

JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
ClientName = Annotated[str, typer.Argument(metavar="CLIENT", help="The client's name, or its id from `show`.")]


@commands.command(epilog="Example: coordinator submit clinic-notes.toml")
def submit(
    file: Annotated[Path, typer.Argument(help="The job, a TOML file.")],
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Open a job on the running daemon."""
    spec = jobs_.read(file)
    if sys.stderr.isatty():
        with Console(stderr=True).status("checking the job and preparing its base model"):
            status = asyncio.run(control.submit(state, spec))
    else:
        status = asyncio.run(control.submit(state, spec))
    _show(status, as_json)


@commands.command(epilog="Example: coordinator jobs --json")
def jobs(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """All jobs of the running daemon."""
    statuses = asyncio.run(control.jobs(state))
    if as_json:
        print_json(pb.ListJobsReply(jobs=statuses))
    elif statuses:
        out.print(tables.jobs(statuses))
    else:
        out.print("No jobs yet. Open one:  coordinator submit JOB.toml")


@commands.command(epilog="Example: coordinator show clinic-notes")
def show(
    job: JobName,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """One job: its clients, their progress and contributions, and what is published."""
    _show(asyncio.run(control.show(state, job)), as_json)


@commands.command(epilog="Example: coordinator close clinic-notes")
def close(
    job: JobName,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Close a round now and publish what is in, below the quorum too; after a failure, publish again."""
    _show(asyncio.run(control.close(state, job)), as_json)


@commands.command(epilog="Example: coordinator publish clinic-notes --method ties --density 0.2")
def publish(
    job: JobName,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; the job's own if empty.")] = "",
    server_learning_rate: Annotated[float, typer.Option(help="Multiplies the mean; 0: the job's own.")] = 0.0,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep.")] = None,
    byzantine_clients: Annotated[
        int | None, typer.Option(help="Bad clients that krum and trimmed-mean hold against.", min=0)
    ] = None,
    krum_keep: Annotated[int | None, typer.Option(help="Contributions that krum averages.", min=0)] = None,
    norm_bound: Annotated[float | None, typer.Option(help="Longest update for norm-clip, in medians.")] = None,
    adapter_rank: Annotated[int, typer.Option(help="Rank of the published adapter; -1: the job's own.")] = -1,
    why: Annotated[str, typer.Option(help="For the record; goes into the manifest.")] = "",
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Make a new version of what is in, by the job's method or another. Nobody trains again; old versions stay."""
    request = pb.PublishRequest(job=job, reason=why)
    if method:
        request.aggregate.method = method
    if server_learning_rate:
        request.aggregate.server_learning_rate = server_learning_rate
    parameters = pb.AggregateSpec(
        density=density, byzantine_clients=byzantine_clients, krum_keep=krum_keep, norm_bound=norm_bound
    )
    request.aggregate.MergeFrom(parameters)  # None is not set
    if adapter_rank >= 0:
        request.adapter_rank = adapter_rank
    _show(asyncio.run(control.publish(state, request)), as_json)


@commands.command(epilog="Example: coordinator exclude clinic-notes ward-3 --why 'wrong folder'")
def exclude(
    job: JobName, client: ClientName, why: Why = "", state: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Take a contribution out; what is published already gets a new version without it."""
    _decide(job, client, pb.DECISION_EXCLUDE, why, state, as_json)


@commands.command(epilog="Example: coordinator admit clinic-notes ward-3 --why 'a large ward'")
def admit(job: JobName, client: ClientName, why: Why = "", state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Let a contribution take part that was quarantined or excluded."""
    _decide(job, client, pb.DECISION_ADMIT, why, state, as_json)


@commands.command(epilog="Example: coordinator replace clinic-notes ward-3")
def replace(
    job: JobName, client: ClientName, why: Why = "", state: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Let a client send another contribution in place of the one that is in: `edge-client join --again`, over there."""
    _decide(job, client, pb.DECISION_LET_REPLACE, why, state, as_json)


@commands.command(epilog="Example: coordinator cancel clinic-notes")
def cancel(job: JobName, state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """End a round without a publication. What came in is kept until the job is deleted."""
    _show(asyncio.run(control.cancel(state, job)), as_json)


@commands.command(epilog="Example: coordinator delete clinic-notes --yes")
def delete(
    job: JobName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Forget a job that is over: its contributions, its publications and all of their files."""
    if not yes:
        typer.confirm(f"Delete {job}, with every contribution and publication of it?", abort=True)
    asyncio.run(control.delete(state, job))
    out.print(f"Deleted {job}.", markup=False)


@commands.command(epilog="Example: coordinator diff clinic-notes 1 2")
def diff(
    job: JobName,
    old: Annotated[int, typer.Argument(help="A version's number.")],
    new: Annotated[int, typer.Argument(help="Another one's.")],
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """What differs between two versions: who took part, how it was averaged, how far the adapter moved, its scores."""
    status = asyncio.run(control.show(state, job))
    folders = {publication.version: Path(publication.folder) for publication in status.publications}
    for version in (old, new):
        if version not in folders:
            raise UsageError(f"{job} has no version {version}", hint=f"coordinator show {job}")
    differences = diffs.compare(folders[old], folders[new])
    if as_json:
        print(json.dumps(differences, indent=2))
    else:
        out.print(diffs.table(differences))


def _decide(job: str, client: str, decision: pb.Decision.ValueType, why: str, state: Path, as_json: bool) -> None:
    request = pb.JudgeRequest(job=job, client=client, decision=decision, why=why)
    _show(asyncio.run(control.judge(state, request)), as_json)


def _show(status: pb.JobStatus, as_json: bool) -> None:
    if as_json:
        print_json(status)
    else:
        out.print(tables.job(status))
