"""Waiting for a job's publication."""

from __future__ import annotations

from edge_client.connection.remote import Remote
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.errors import Refused, Unreachable
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb

_ENDED = (pb.STATE_EXPIRED, pb.STATE_FAILED, pb.STATE_CANCELLED)


async def wait(remote: Remote, job: str, screen: Screen) -> None:
    """Watch a job until it is published, and report each of its states.

    Raises:
        Refused: the job ended without a publication.
        Unreachable: the coordinator ended the call.
    """
    reported = ""
    async for status in remote.watch(job):
        if status.state == pb.STATE_PUBLISHED:
            screen.say(events.VersionPublished(job, status.publications[-1].version))
            return
        if status.state in _ENDED:
            raise Refused(f"nothing will be published: {one_line(status.reason)}")
        state = state_name(status.state)
        if state != reported:
            screen.say(events.WaitingForPublication(state))
            reported = state
    raise Unreachable("the coordinator ended the call", hint="edge-client pull, later")


def state_name(state: pb.State.ValueType) -> str:
    """`open`, `publishing`, `published` …"""
    return pb.State.Name(state).removeprefix("STATE_").lower()
