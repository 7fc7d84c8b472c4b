"""Taking part in a job, as one straight line: join, fetch, train, send, receipt.

Every step leaves its result in the outbox and is skipped when the result is there, so running it again resumes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from edge_client import outbox
from edge_client.connection import job_check, retry
from edge_client.connection.remote import Remote
from edge_client.outbox import Outbox
from edge_client.preflight import disk
from edge_client.proofs import receipts
from edge_client.session.heartbeat import Heartbeat
from edge_client.session.participant import Participant
from edge_client.session.train import train
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import signing, tls
from oneround.errors import Refused, Unreachable
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb

APPROVAL_SECONDS = 5.0  # between two looks at whether the operator has let this machine in


class AwaitsApproval(Refused):
    """The operator has not let this machine in, and may yet."""


async def take_part(
    remote: Remote, job_name: str, participant: Participant, screen: Screen, *, waits: bool = True
) -> pb.Receipt:
    """From joining to the receipt. Where the operator has to let this machine in, it `waits` for that.

    Raises:
        AwaitsApproval: it does not wait.
        Refused: the coordinator says no, or has quarantined the contribution.
        BadData: the data, or what the coordinator sent, is invalid; or its receipt is.
    """
    reply = await _join(remote, participant.request(job_name), screen, waits=waits)
    _require_same_job(reply.job, job_name, participant)
    box = outbox.outbox(participant.state, reply.job)
    box.keep_joined(remote.server, reply)
    if participant.consent:
        box.keep_consent(participant.consent)
    screen.say(events.Joined(job=reply.job.spec.name, server=remote.server, client=participant.name))

    if reply.HasField("receipt"):
        if not _replaces(reply, participant):
            contribution = box.trained()
            digest = contribution.digest if contribution else ""
            _keep_receipt(reply.receipt, reply.job, digest, remote, box, screen)
            return _require_part(reply.receipt, reply.judgement, screen)
        box.begin_again(reply.receipt.digest)
    async with _beating(remote, reply.lease) as heartbeat:
        declaration = await _trained(remote, reply.job, box, participant, heartbeat, screen)
        receipt = await _send(remote, reply, declaration, box, screen)
        _keep_receipt(receipt, reply.job, declaration.digest, remote, box, screen)
        judgement = await heartbeat.verdict()
    return _require_part(receipt, judgement, screen)


async def _join(remote: Remote, request: pb.JoinRequest, screen: Screen, *, waits: bool) -> pb.JoinReply:
    """Join, as soon as the operator has approved where the job takes that.

    Raises:
        AwaitsApproval: nobody has before the deadline, or so far if it does not wait.
    """
    reply = await remote.join(request)
    if reply.awaits_approval:
        screen.say(
            events.ApprovalAwaited(job=reply.job.spec.name, id=remote.me.client_id[:12], name=request.client_name)
        )
    while reply.awaits_approval:
        if not waits or time.time() > reply.job.deadline_unix:
            raise AwaitsApproval(f"nobody has let this machine into {reply.job.spec.name!r} so far")
        await asyncio.sleep(APPROVAL_SECONDS)
        with suppress(Unreachable):
            reply = await remote.join(request)
    return reply


def _require_same_job(job: pb.Job, name: str, participant: Participant) -> None:
    """Raises Refused when a job is not the one that was asked for and agreed to, BadData when it is invalid."""
    job_check.check(job)
    if job.spec.name != name or (participant.agreed is not None and job != participant.agreed):
        raise Refused(
            f"{name} has changed: the coordinator now announces another job under this name",
            hint="run it again, to see what it asks for now; nothing was sent but what joining takes",
        )


def _replaces(reply: pb.JoinReply, participant: Participant) -> bool:
    """Whether to train anew, though a contribution of this machine is in.

    Raises:
        Refused: the person asks for it, and the operator does not allow it.
    """
    if participant.again and not reply.may_replace:
        raise Refused(
            f"this machine's contribution to {reply.job.spec.name!r} is in already",
            hint=f"ask the operator for `coordinator replace {reply.job.spec.name} {participant.name}`",
        )
    return participant.again


@asynccontextmanager
async def _beating(remote: Remote, lease: str) -> AsyncIterator[Heartbeat]:
    """A heartbeat that goes on meanwhile."""
    heartbeat = Heartbeat(lease)
    beating = asyncio.create_task(heartbeat.beat(remote))
    try:
        yield heartbeat
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def _trained(
    remote: Remote, job: pb.Job, box: Outbox, participant: Participant, heartbeat: Heartbeat, screen: Screen
) -> pb.Declaration:
    """What the finished adapter in the outbox declares, trained now if it is not there."""
    declaration = box.trained()
    if declaration is not None:
        screen.say(events.AlreadyTrained(folder=str(box.folder)))
        return declaration
    disk.room(job, participant.state, participant.model).require()
    model = str(participant.model.resolve()) if participant.model else ""
    box.keep_source(outbox.DataSource(str(participant.data.resolve()), model, participant.skip_bad_rows))
    async with participant.pausing.watching(screen):
        return await train(remote, job, box, participant, heartbeat, screen)


async def _send(
    remote: Remote, reply: pb.JoinReply, declaration: pb.Declaration, box: Outbox, screen: Screen
) -> pb.Receipt:
    """Upload until there is a receipt; breaks are resumed, and only the deadline ends the trying."""
    with screen.bar("sending", declaration.size) as advance:
        upload = partial(remote.upload, reply.lease, declaration, box.adapter)
        return await retry.through(remote, reply.job.deadline_unix, screen, upload, advance)


def _keep_receipt(receipt: pb.Receipt, job: pb.Job, digest: str, remote: Remote, box: Outbox, screen: Screen) -> None:
    """Check a receipt over what was sent, by its digest if that is known, and keep it.

    Raises:
        BadData: it is not the coordinator's, or for something else.
    """
    receipts.accept(receipt, job, remote.me.client_id, digest, remote.certificate)
    box.keep_receipt(receipt)
    screen.say(events.ReceiptReceived(size=receipt.size, digest=receipt.digest))
    if not remote.certificate:
        screen.say(events.ReceiptByAnyone(fingerprint=tls.grouped(signing.fingerprint(receipt.signature.key))))


def _require_part(receipt: pb.Receipt, judgement: pb.Judgement, screen: Screen) -> pb.Receipt:
    """Raises Refused when the contribution takes no part."""
    if judgement.verdict == pb.VERDICT_QUARANTINED:
        raise Refused(f"the contribution is stored, but takes no part in the average: {one_line(judgement.reason)}")
    if judgement.verdict in (pb.VERDICT_UNSPECIFIED, pb.VERDICT_PENDING):
        screen.say(events.VerdictPending(job=receipt.job))
    screen.say(events.Done(job=receipt.job))
    return receipt
