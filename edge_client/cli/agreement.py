"""The person's agreement, before anything of theirs leaves this machine. A command ends where it is not given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import typer

from edge_client import consent, outbox
from edge_client.connection.identity import Pins
from edge_client.connection.remote import Remote
from edge_client.session import Participant
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.errors import Refused
from oneround.v1 import federation_pb2 as pb


async def for_job(remote: Remote, offered: pb.Job, participant: Participant, screen: Screen, *, yes: bool) -> str:
    """Ask for agreement to a job, unless it was given before; returns the digest of its terms.

    Raises:
        Exit: the person declines.
        UsageError: nobody is there to be asked.
    """
    state, request = participant.state, participant.request(offered.spec.name)
    terms = consent.terms(offered, request, remote.fingerprint)
    under_earlier_keys = [replace(terms, key=key) for key in Pins(state).earlier(remote.fingerprint)]
    if consent.agreed_before(outbox.all_outboxes(state), terms, *under_earlier_keys):
        return terms.digest
    requirements = consent.requirements(offered, request.machine, state, participant.model)
    deadline = offered.deadline_unix
    if not await consent.ask(
        screen, terms, requirements, server=remote.server, deadline=deadline, data=participant.data, yes=yes
    ):
        _end(screen)
    return terms.digest


async def for_every_job(
    participant: Participant, accept: Sequence[str], server: str, screen: Screen, yes: bool
) -> None:
    """Ask for agreement to every job of these names that will ever appear.

    Raises:
        Exit: the person declines.
        UsageError: nobody is there to be asked.
    """
    request = participant.request("")
    if not await consent.ask_standing(screen, request, accept, server=server, data=participant.data, yes=yes):
        _end(screen)


def _end(screen: Screen) -> NoReturn:
    screen.say(events.Declined())
    raise typer.Exit(Refused.exit_code)
