"""Taking part in a job, as one straight line: join, fetch, train, send, receipt.

Every step leaves its result in the outbox and is skipped when the result is there, so running it again resumes it.
"""

from __future__ import annotations

import asyncio
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from converters import adapter, checkpoint
from converters.adapter import Adapter, Shape
from edge_client import outbox
from edge_client.backends import Backend, Progress
from edge_client.connection import job_check, retry
from edge_client.connection.remote import Remote, local_path
from edge_client.data import tokenize
from edge_client.data.batches import Batches
from edge_client.outbox import Outbox
from edge_client.pausing.controller import PauseController
from edge_client.preflight import compat, disk, memory
from edge_client.proofs import receipts
from edge_client.training import snapshot
from edge_client.training.recipe import EXACT, Recipe, Setup
from edge_client.training.snapshot import Snapshot
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import signing, stream, tls
from oneround.errors import BadData, NotEnough, OneroundError, Refused, Unreachable
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb

HEARTBEAT_SECONDS = 2.0
VERDICT_SECONDS = 30.0  # how long to wait for what the coordinator makes of a contribution
APPROVAL_SECONDS = 5.0  # between two looks at whether the operator has let this machine in
SAVE_SECONDS = 30.0  # between two looks at how training stands that are kept
SAVING_SHARE = 0.05  # of the time, at most, goes into keeping them


@dataclass(frozen=True)
class Participant:
    """Who takes part, with what."""

    state: Path
    name: str
    data: Path
    backend: Backend
    model: Path | None = None  # the base model's folder, if it is on this machine
    skip_bad_rows: bool = False
    save_every: float = SAVE_SECONDS  # seconds
    setup: Setup = EXACT  # how this machine trains, if memory is enough for it
    again: bool = False  # train anew, where the operator lets this machine send another contribution
    pausing: PauseController = field(default_factory=PauseController)  # keeps to the manners that the person asks for
    consent: str = ""  # digest of the terms that the person has agreed to
    agreed: pb.Job | None = None  # the job that was shown; no other one is taken part in

    def request(self, job: str) -> pb.JoinRequest:
        """What is said of this machine to join a job."""
        return pb.JoinRequest(
            job=job,
            client_name=self.name,
            machine=pb.Machine(
                platform=f"{platform.system()} {platform.machine()}",
                backend=self.backend.name,
                device=self.backend.device(),
            ),
        )


class AwaitsApproval(Refused):
    """The operator has not let this machine in, and may yet."""


async def take_part(
    remote: Remote, job_name: str, participant: Participant, screen: Screen, *, waits: bool = True
) -> pb.Receipt:
    """From joining to the receipt. Where the operator has to let this machine in, it `waits` for that.

    Raises:
        AwaitsApproval: it does not wait.
        Refused: the coordinator says no, or has quarantined the contribution.
        BadData: the data, or what the coordinator sent, is not sound; a receipt that is none too.
    """
    reply = await _let_in(remote, participant.request(job_name), screen, waits=waits)
    job_check.check(reply.job)
    if reply.job.spec.name != job_name or (participant.agreed is not None and reply.job != participant.agreed):
        raise Refused(
            f"{job_name} is not the job any more that it was: the coordinator announces another one now",
            hint="run it again, to see what it asks for now; nothing was sent but what joining takes",
        )
    box = outbox.outbox(participant.state, reply.job)
    box.keep_joined(remote.server, reply)
    if participant.consent:
        box.keep_consent(participant.consent)
    screen.say(events.Joined(reply.job.spec.name, remote.server, participant.name))

    if reply.HasField("receipt") and not (participant.again and reply.may_replace):
        if participant.again:
            raise Refused(
                f"this machine's contribution to {reply.job.spec.name!r} is in already",
                hint=f"ask the operator for `coordinator replace {reply.job.spec.name} {participant.name}`",
            )
        mine = box.trained()
        receipts.accept(reply.receipt, reply.job, remote.me.client_id, mine.digest if mine else "", remote.certificate)
        _safe(box.keep_receipt(reply.receipt), remote, screen)
        return _judged(reply.receipt, reply.judgement, screen)
    if reply.HasField("receipt"):
        box.begin_again(reply.receipt.digest)
    heartbeat = Heartbeat(pb.HeartbeatRequest(lease=reply.lease))
    beating = asyncio.create_task(heartbeat.beat(remote))
    try:
        declaration = box.trained()
        if declaration is None:
            disk.room(reply.job, participant.state, participant.model).require()
            model = str(participant.model.resolve()) if participant.model else ""
            box.keep_source(outbox.DataSource(str(participant.data.resolve()), model, participant.skip_bad_rows))
            async with participant.pausing.watching(screen):
                declaration = await _train(remote, reply, box, participant, heartbeat, screen)
        else:
            screen.say(events.AlreadyTrained(str(box.folder)))
        receipt = await _send(remote, reply, declaration, box, screen)
        receipts.accept(receipt, reply.job, remote.me.client_id, declaration.digest, remote.certificate)
        _safe(box.keep_receipt(receipt), remote, screen)
        judgement = await _verdict(remote, reply.lease)
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
    return _judged(receipt, judgement, screen)


async def _let_in(remote: Remote, request: pb.JoinRequest, screen: Screen, *, waits: bool) -> pb.JoinReply:
    """Join, as soon as the operator has approved where the job takes that.

    Raises:
        AwaitsApproval: nobody has before the deadline, or so far if it does not wait.
    """
    reply = await remote.join(request)
    if reply.awaits_approval:
        screen.say(events.ApprovalAwaited(reply.job.spec.name, remote.me.client_id[:12], request.client_name))
    while reply.awaits_approval:
        if not waits or time.time() > reply.job.deadline_unix:
            raise AwaitsApproval(f"nobody has let this machine into {reply.job.spec.name!r} so far")
        await asyncio.sleep(APPROVAL_SECONDS)
        with suppress(Unreachable):
            reply = await remote.join(request)
    return reply


@dataclass
class Heartbeat:
    """What the coordinator is told every few seconds, and why it wants this client to stop, once it does."""

    now: pb.HeartbeatRequest
    stop: str = ""

    async def beat(self, remote: Remote) -> None:
        """Tell until cancelled. A coordinator that does not answer, or has troubles, is no reason to stop training."""
        pause, waits, misses = HEARTBEAT_SECONDS, retry.pauses(), 0
        while True:
            place = remote.server
            try:
                answer = await remote.heartbeat(self.now)
                pause = min(max(HEARTBEAT_SECONDS, answer.next_seconds), retry.LONGEST_PAUSE)
                waits, misses = retry.pauses(), 0
                if answer.directive == pb.DIRECTIVE_STOP:
                    self.stop = one_line(answer.reason) or "it gives no reason"
            except Unreachable:
                pause, misses = max(HEARTBEAT_SECONDS, next(waits)), misses + 1
                if misses >= retry.LOST_AFTER and await remote.find_again(place):
                    continue
            except OneroundError:
                pass
            await asyncio.sleep(pause)

    def check(self) -> None:
        """Raises Refused when this client is to stop."""
        if self.stop:
            raise Refused(f"the coordinator stopped this job: {self.stop}")


async def fetch_base(remote: Remote, job: pb.Job, state: Path, model: Path | None, screen: Screen) -> Path:
    """The folder of the job's base model: the person's own if it is the same, or fetched from the coordinator.

    Raises:
        BadData: the person's own differs from the job's.
    """
    if model is not None:
        for artifact in job.base_files:
            file = local_path(model, artifact)
            if not file.is_file() or await asyncio.to_thread(stream.digest, file) != artifact.digest:
                raise BadData(
                    f"{model} is not the job's base model: {artifact.name} is missing or differs",
                    hint="leave --model out, and the coordinator sends the base",
                )
        return model
    folder = outbox.model_folder(state, job)
    wanted = [(local_path(folder, artifact), artifact) for artifact in job.base_files]
    missing = [(file, artifact) for file, artifact in wanted if not file.is_file()]
    if missing:
        with screen.bar("base", sum(artifact.size for _, artifact in missing)) as advance:
            before = 0

            def on_bytes(done: int) -> None:
                advance(before + done)

            for file, artifact in missing:
                fetch = partial(remote.download, job.spec.name, artifact, file)
                await retry.through(remote, job.deadline_unix, screen, fetch, on_bytes)
                before += artifact.size
    return folder


async def _train(
    remote: Remote, reply: pb.JoinReply, box: Outbox, participant: Participant, heartbeat: Heartbeat, screen: Screen
) -> pb.Declaration:
    job, pausing = reply.job, participant.pausing
    await pausing.ready(lambda: heartbeat.stop)
    heartbeat.check()
    rows = await asyncio.to_thread(tokenize.load, participant.data, skip_bad_rows=participant.skip_bad_rows)
    base = await fetch_base(remote, job, participant.state, participant.model, screen)
    if not box.initial.exists():
        with screen.bar("adapter", job.initial.size) as advance:
            fetch = partial(remote.download, job.spec.name, job.initial, box.initial)
            await retry.through(remote, job.deadline_unix, screen, fetch, advance)
    initial = adapter.read(box.initial)
    if set(initial.ranks.values()) != {job.spec.lora.rank}:
        raise BadData(f"the coordinator's initial adapter is not of rank {job.spec.lora.rank}, as its job says")
    adapter.check(initial, {module.name: Shape(module.out_features, module.in_features) for module in job.modules})

    tokenizer = await asyncio.to_thread(tokenize.load_tokenizer, base)
    prepared = await asyncio.to_thread(
        tokenize.tokenise, rows.train, tokenizer, job.spec.train.max_seq_len, skip_bad_rows=participant.skip_bad_rows
    )
    train = job.spec.train
    room = train.batch_size * train.max_seq_len if train.packing else 0
    plan = Batches(prepared.examples, train.batch_size, train.epochs, train.seed, room=room)
    compat.check(participant.backend.name, base, (len(example.ids) for example in prepared.examples))
    recipe = Recipe.from_spec(job.spec, plan.total_steps)
    if skipped := rows.skipped + prepared.skipped:
        screen.say(events.RowsSkipped(skipped))
    if prepared.truncated or prepared.dropped:
        screen.say(events.RowsTruncated(prepared.truncated, prepared.dropped, job.spec.train.max_seq_len))
    screen.say(
        events.TrainingPlan(
            base=job.spec.model.base,
            rank=job.spec.lora.rank,
            modules=len(job.modules),
            send_bytes=disk.sent_bytes(job),
            examples=plan.num_examples,
            tokens=plan.num_targets,
            held_out=len(rows.held_out),
            steps=plan.total_steps,
            backend=participant.backend.name,
            device=participant.backend.device(),
            rounding=participant.setup.rounding,
        )
    )

    disk.room(job, participant.state, participant.model).require()
    await asyncio.to_thread(disk.keep_room, job, box)
    run = snapshot.run_digest(participant.backend.name, job.initial.digest, recipe, plan, participant.setup.rounding)
    keeping = SnapshotSchedule(box, run, participant.save_every, screen)
    kept = await asyncio.to_thread(snapshot.read, box.snapshot, run)
    setup = kept.setup if kept else participant.setup
    if kept is not None:
        screen.say(events.TrainingResumed(kept.step, plan.total_steps))
    elif box.snapshot.exists():
        screen.say(events.TrainingRestarted())
    outlook = memory.outlook(base, job, participant.backend, prepared.longest, setup)
    if outlook is not None and kept is None:
        setup = outlook.setup
        if setup != participant.setup:
            screen.say(events.BatchSplit(setup.parts, setup.checkpointing))
    if outlook is not None and outlook.short:
        screen.say(events.MemoryShort(outlook.needed / 1e9, (outlook.available or 0) / 1e9))
    losses = list(kept.losses) if kept else []
    started = pausing.clock()
    beat = heartbeat.now
    beat.total_steps = plan.total_steps
    with screen.bar("training", plan.total_steps, pausing.clock) as advance:

        def on_step(progress: Progress) -> None:
            nonlocal setup
            if progress.setup != setup:
                setup = progress.setup
                screen.say(events.BatchHalved(progress.step, setup.parts, setup.checkpointing))
            losses.append(progress.loss)
            beat.step, beat.loss = progress.step, progress.loss
            beat.tokens_per_second = progress.tokens / max(progress.seconds, 1e-9)
            advance(
                progress.step,
                f"loss {progress.loss:.3f}, {beat.tokens_per_second:.0f} tokens/s",
                loss=progress.loss,
                tokens_per_second=beat.tokens_per_second,
            )
            pauses = pausing.pauses and progress.step < progress.total_steps
            keeping.after(losses, progress, now=pauses or bool(heartbeat.stop))
            if pauses:
                beat.tokens_per_second = 0.0
                pausing.wait(lambda: heartbeat.stop)
            heartbeat.check()

        try:
            trained = await asyncio.to_thread(
                participant.backend.train, base, initial, recipe, plan, on_step, kept, setup
            )
        except asyncio.CancelledError:
            heartbeat.stop = "interrupted"  # training runs in a thread, which only ends by itself
            raise

    last_epoch = losses[-plan.steps_per_epoch :]
    declaration = pb.Declaration(
        num_examples=plan.num_examples,
        num_tokens=plan.num_targets,
        steps=plan.total_steps,
        train_loss=sum(last_epoch) / len(last_epoch),
    )
    screen.say(events.Trained(plan.total_steps, pausing.clock() - started, declaration.train_loss))
    described = {
        "job": job.spec.name,
        "base": job.base_fingerprint,
        "tokenizer": checkpoint.tokenizer_digest(base),
        "chat_template": checkpoint.chat_template_digest(base),
        "num_examples": str(declaration.num_examples),
        "num_tokens": str(declaration.num_tokens),
        "steps": str(declaration.steps),
        "train_loss": repr(declaration.train_loss),
    }
    frozen_a = job.initial.digest if job.spec.lora.freeze_a else ""
    return box.keep_trained(Adapter(trained.modules, described), job.spec.upload.dtype, declaration, frozen_a)


class SnapshotSchedule:
    """Keeps how training stands every so many seconds, and less often where that takes long."""

    def __init__(self, box: Outbox, run: str, every: float, screen: Screen) -> None:
        self._box, self._run, self._every, self._screen = box, run, every, screen
        self._next = time.monotonic() + every
        self._failed = False

    def after(self, losses: list[float], progress: Progress, *, now: bool) -> None:
        """A step is done; `now`: training ends or pauses here. A full disk is told once, and no reason to end."""
        if not now and time.monotonic() < self._next:
            return
        began = time.monotonic()
        try:
            snapshot.write(self._box.snapshot, Snapshot(tuple(losses), progress.arrays(), progress.setup), self._run)
            self._failed = False
        except (OSError, NotEnough) as error:
            if not self._failed:
                self._screen.say(events.SnapshotFailed(str(error)))
            self._failed = True
        ended = time.monotonic()
        self._next = ended + max(self._every, (ended - began) / SAVING_SHARE)


async def _send(
    remote: Remote, reply: pb.JoinReply, declaration: pb.Declaration, box: Outbox, screen: Screen
) -> pb.Receipt:
    """Upload until there is a receipt; breaks are resumed, and only the deadline ends the trying."""
    with screen.bar("sending", declaration.size) as advance:
        upload = partial(remote.upload, reply.lease, declaration, box.adapter)
        return await retry.through(remote, reply.job.deadline_unix, screen, upload, advance)


def _safe(receipt: pb.Receipt, remote: Remote, screen: Screen) -> None:
    screen.say(events.ReceiptReceived(receipt.size, receipt.digest))
    if not remote.certificate:
        screen.say(events.ReceiptByAnyone(tls.grouped(signing.fingerprint(receipt.signature.key))))


async def _verdict(remote: Remote, lease: str) -> pb.Judgement:
    """What the coordinator makes of the contribution, if it says so soon. The receipt holds either way."""
    with suppress(OneroundError):
        for _ in range(int(VERDICT_SECONDS / 0.5)):
            answer = await remote.heartbeat(pb.HeartbeatRequest(lease=lease))
            if answer.judgement.verdict not in (pb.VERDICT_UNSPECIFIED, pb.VERDICT_PENDING):
                return answer.judgement
            await asyncio.sleep(0.5)
    return pb.Judgement(verdict=pb.VERDICT_PENDING)


def _judged(receipt: pb.Receipt, judgement: pb.Judgement, screen: Screen) -> pb.Receipt:
    """Raises Refused when the contribution takes no part."""
    if judgement.verdict == pb.VERDICT_QUARANTINED:
        raise Refused(f"the contribution is stored, but takes no part in the average: {one_line(judgement.reason)}")
    if judgement.verdict in (pb.VERDICT_UNSPECIFIED, pb.VERDICT_PENDING):
        screen.say(events.VerdictPending(receipt.job))
    screen.say(events.Done(receipt.job))
    return receipt
