"""`edge-client join`: take part in a job."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated

import typer

from edge_client import consent, outbox, session
from edge_client.cli import agreement, options
from edge_client.cli.options import DEFAULT_STATE, Json, Link, OpenJob, State, TrainingOptions, Yes
from edge_client.cli.spread import spread
from edge_client.connection import connect, job_check, retry
from edge_client.connection.remote import Remote
from edge_client.connection.target import ANY, Target
from edge_client.results import published
from edge_client.session import Participant
from edge_client.ui.screen import Screen
from oneround import command
from oneround.v1 import federation_pb2 as pb


@spread
def join(
    link: Link = "",
    target: Target = ANY,
    job: OpenJob = "",
    training: TrainingOptions = TrainingOptions(),  # noqa: B008  frozen
    again: Annotated[
        bool, typer.Option("--again", help="Train anew and replace what was sent, where the operator allows it.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the result is published.")] = False,
    yes: Yes = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Take part in a job, start to receipt. Run it again after any interruption, and it goes on."""
    screen = Screen(as_json)
    target = options.invited(target, link)
    training.pause_policy()  # an error of usage comes before one of data
    options.make_folder(state)
    unsent = any(box.trained() and not box.receipt() for box in outbox.all_outboxes(state))
    if not unsent:  # what is trained needs no data any more
        training.require_data()
    training.give_way()
    participant = replace(training.participant(state, screen), again=again)
    asyncio.run(_join(target, job, participant, screen, yes=yes, wait=wait))


async def _join(target: Target, job: str, participant: Participant, screen: Screen, *, yes: bool, wait: bool) -> None:
    async with connect.connected(target, participant.state, screen) as remote:
        with command.only_one(participant.state, "edge-client join"):
            offered = await _offered(remote, job)
            digest = await agreement.for_job(remote, offered, participant, screen, yes=yes)
            participant = replace(participant, consent=digest, agreed=offered)
            receipt = await session.take_part(remote, offered.spec.name, participant, screen)
        if wait:
            await _wait(remote, receipt.job, offered.deadline_unix, screen)


async def _offered(remote: Remote, name: str) -> pb.Job:
    """The job of this name, or the one that the token is for, or the only one that is open.

    Raises:
        Refused: there is none, or it asks for what no job may.
    """
    status = consent.choose_job((await remote.jobs()).jobs, name or remote.token_job)
    offered = await remote.describe(status.spec.name)
    job_check.check(offered)
    return offered


async def _wait(remote: Remote, job: str, deadline: float, screen: Screen) -> None:
    """Until the job is published; a coordinator that does not answer is asked again, until the deadline."""
    await retry.through(remote, deadline, screen, lambda _: published.wait(remote, job, screen))
