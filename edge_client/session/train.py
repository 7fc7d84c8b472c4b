"""Training a job on this machine: from what was joined to the finished adapter in the outbox."""

from __future__ import annotations

import asyncio
from pathlib import Path

from converters import checkpoint
from converters.adapter import Adapter
from converters.updates import sizes
from edge_client.connection.remote import Remote
from edge_client.outbox import Outbox
from edge_client.preflight import disk
from edge_client.session.between_steps import BetweenSteps
from edge_client.session.fetch import fetch_base, fetch_initial
from edge_client.session.heartbeat import Heartbeat
from edge_client.session.participant import Participant
from edge_client.session.prepare import Prepared, estimate_memory, load_rows, prepare
from edge_client.session.snapshots import SnapshotSchedule
from edge_client.training import snapshot
from edge_client.training.plan import TrainingPlan
from edge_client.training.recipe import Recipe, Setup
from edge_client.training.snapshot import Snapshot
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.v1 import federation_pb2 as pb


async def train(
    remote: Remote, job: pb.Job, box: Outbox, participant: Participant, heartbeat: Heartbeat, screen: Screen
) -> pb.Declaration:
    """Fetch, prepare, train, and leave the adapter in the outbox; what was done before an interruption is resumed.

    Raises:
        BadData: the rows, the base or the initial adapter are not sound.
        NotEnough: disk or memory is too short.
        Refused: the coordinator stops this job.
        UsageError: the backend cannot train this base on these rows.
    """
    await participant.pausing.ready(lambda: heartbeat.stop)
    heartbeat.check()
    rows = await asyncio.to_thread(load_rows, participant.data, job.spec, skip_bad_rows=participant.skip_bad_rows)
    base = await fetch_base(remote, job, participant.state, participant.model, screen)
    initial = await fetch_initial(remote, job, box, screen)
    prepared = await asyncio.to_thread(
        prepare, rows, base, job.spec, participant.backend, skip_bad_rows=participant.skip_bad_rows
    )
    prepared.require_compatible()
    _tell_plan(job, prepared, participant, screen)
    disk.room(job, participant.state, participant.model).require()
    await asyncio.to_thread(disk.keep_room, job, box)
    trained, losses = await _run(job, base, initial, prepared, box, participant, heartbeat, screen)
    declaration = _declare(prepared.plan, losses)
    described = Adapter(trained.modules, _described(job, base, declaration))
    frozen_a = job.initial.digest if job.spec.lora.freeze_a else ""
    return box.keep_trained(described, job.spec.upload.dtype, declaration, frozen_a)


def _tell_plan(job: pb.Job, prepared: Prepared, participant: Participant, screen: Screen) -> None:
    plan, backend = prepared.plan, participant.backend
    if prepared.skipped:
        screen.say(events.RowsSkipped(skipped=prepared.skipped))
    if prepared.truncated or prepared.dropped:
        screen.say(
            events.RowsTruncated(
                truncated=prepared.truncated, dropped=prepared.dropped, max_seq_len=job.spec.train.max_seq_len
            )
        )
    screen.say(
        events.PlanMade(
            base=job.spec.model.base,
            rank=job.spec.lora.rank,
            modules=len(job.modules),
            send_bytes=sizes.sent_bytes(job),
            examples=plan.num_examples,
            tokens=plan.num_targets,
            held_out=prepared.held_out,
            steps=plan.total_steps,
            backend=backend.name,
            device=backend.device(),
            rounding=participant.setup.rounding,
        )
    )


async def _run(
    job: pb.Job,
    base: Path,
    initial: Adapter,
    prepared: Prepared,
    box: Outbox,
    participant: Participant,
    heartbeat: Heartbeat,
    screen: Screen,
) -> tuple[Adapter, list[float]]:
    """Train in a thread, from a snapshot if there is one of this run; returns the adapter and the loss of each step."""
    plan, backend, pausing = prepared.plan, participant.backend, participant.pausing
    recipe = Recipe.from_spec(job.spec, plan.total_steps)
    run = snapshot.run_digest(backend.name, job.initial.digest, recipe, plan, participant.setup.rounding)
    resumed = await asyncio.to_thread(snapshot.read, box.snapshot, run)
    _tell_resumption(resumed, box, plan, screen)
    setup = _choose_setup(job, base, prepared.longest, resumed, participant, screen)
    schedule = SnapshotSchedule(box, run, participant.save_every, screen)
    losses = list(resumed.losses) if resumed else []
    heartbeat.now.total_steps = plan.total_steps
    began = pausing.clock()
    with screen.bar("training", plan.total_steps, pausing.clock) as advance:
        between_steps = BetweenSteps(heartbeat, pausing, schedule, screen, advance, setup, losses)
        try:
            trained = await asyncio.to_thread(backend.train, base, initial, recipe, plan, between_steps, resumed, setup)
        except asyncio.CancelledError:
            heartbeat.stop = "interrupted"  # training runs in a thread, which only ends by itself
            raise
    seconds = pausing.clock() - began
    screen.say(events.Trained(steps=plan.total_steps, seconds=seconds, loss=_last_epoch(plan, losses)))
    return trained, losses


def _tell_resumption(resumed: Snapshot | None, box: Outbox, plan: TrainingPlan, screen: Screen) -> None:
    if resumed is not None:
        screen.say(events.TrainingResumed(step=resumed.step, steps=plan.total_steps))
    elif box.snapshot.exists():
        screen.say(events.TrainingRestarted())


def _choose_setup(
    job: pb.Job, base: Path, longest: int, resumed: Snapshot | None, participant: Participant, screen: Screen
) -> Setup:
    """The first setup that fits into memory, from the one that was asked for on; that of the snapshot if there is one,
    since in other parts a batch's sum would be rounded otherwise."""
    requested = resumed.setup if resumed else participant.setup
    estimate = estimate_memory(base, job, participant.backend, longest, requested)
    if estimate is None:
        return requested
    setup = requested if resumed else estimate.setup
    if setup != requested:
        screen.say(events.BatchSplit(parts=setup.parts, checkpointing=setup.checkpointing))
    if estimate.short:
        screen.say(
            events.MemoryShort(
                needed_gb=estimate.needed / 1000000000.0, available_gb=(estimate.available or 0) / 1000000000.0
            )
        )
    return setup


def _last_epoch(plan: TrainingPlan, losses: list[float]) -> float:
    """Mean loss of the last epoch's steps."""
    last = losses[-plan.steps_per_epoch :]
    return sum(last) / len(last)


def _declare(plan: TrainingPlan, losses: list[float]) -> pb.Declaration:
    return pb.Declaration(
        num_examples=plan.num_examples,
        num_tokens=plan.num_targets,
        steps=plan.total_steps,
        train_loss=_last_epoch(plan, losses),
    )


def _described(job: pb.Job, base: Path, declaration: pb.Declaration) -> dict[str, str]:
    """What the adapter's file says of itself."""
    return {
        "job": job.spec.name,
        "base": job.base_fingerprint,
        "tokenizer": checkpoint.tokenizer_digest(base),
        "chat_template": checkpoint.chat_template_digest(base),
        "num_examples": str(declaration.num_examples),
        "num_tokens": str(declaration.num_tokens),
        "steps": str(declaration.steps),
        "train_loss": repr(declaration.train_loss),
    }
