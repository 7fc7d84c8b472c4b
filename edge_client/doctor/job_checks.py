"""Checks of one job on this machine: its coordinator, its base, the person's data, and whether there is room for it."""

from __future__ import annotations

import asyncio
import datetime
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeVar

from converters import checkpoint
from edge_client import outbox
from edge_client.connection import connect, job_check, trust
from edge_client.connection.remote import local_path
from edge_client.data import files
from edge_client.doctor.finding import Case, Finding, note, ok
from edge_client.preflight import disk
from edge_client.preflight.memory import MemoryEstimate
from edge_client.session.fetch import fetch_base
from edge_client.session.prepare import Prepared, estimate_memory, load_rows, prepare
from edge_client.ui import events
from edge_client.ui.events import Event
from edge_client.ui.screen import Screen
from oneround import tls
from oneround.errors import NotEnough, OneroundError, Refused, UsageError
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

SKEW_NOTED, SKEW_STOPS = 60.0, 3600.0  # seconds
EXPIRY_NOTED = datetime.timedelta(days=30)
SMALL_BYTES = 64 << 20  # the largest of a base's files that is fetched for a look
LITTLE_BYTES = 2 * 10**9  # free on a disk of which a job's need is not known

_SET_CLOCK = {
    "darwin": "System Settings > General > Date & Time: set time and date automatically",
    "linux": "timedatectl set-ntp true",
}


Kind = TypeVar("Kind", bound=Event)


class _Recorder(Screen):
    """Keeps the events of finding a coordinator, and prints nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Event] = []

    def say(self, event: Event) -> None:
        self._events.append(event)

    def last(self, kind: type[Kind]) -> Kind | None:
        """The last event of a kind."""
        return next((event for event in reversed(self._events) if isinstance(event, kind)), None)


async def coordinator(case: Case) -> Finding | None:
    recorder = _Recorder()
    connecting = connect.connected(case.target, case.state, recorder, case.job_name, pin=False)
    try:
        case.remote = await case.open_now.enter_async_context(connecting)
        case.first_use = recorder.last(events.Pinned) is not None
        asked_at = time.time()
        case.jobs = await case.remote.jobs()
        case.skew = (asked_at + time.time()) / 2 - case.jobs.now_unix
    except Refused as error:
        case.key_changed = error  # which is for the certificate's line
        return None
    except OneroundError as error:
        case.unreached = str(error)
        raise
    if moved := recorder.last(events.CoordinatorMoved):
        return ok("coordinator", f"at {case.remote.server} now, and no more at {moved.before}")
    how = ", found on this network" if recorder.last(events.CoordinatorFound) else ""
    return ok("coordinator", f"answers at {case.remote.server}{how}")


async def certificate(case: Case) -> Finding | None:
    if case.key_changed is not None:
        raise case.key_changed
    if case.remote is None:
        return None
    if not case.remote.certificate:
        return note("certificate", "no TLS, as --insecure asks", "leave --insecure out, but for a test on this machine")
    return validity(case.remote.certificate, case.first_use, datetime.datetime.now(datetime.UTC))


def validity(pem: bytes, first_use: bool, now: datetime.datetime) -> Finding:
    """What a coordinator's certificate is worth at a time.

    Raises:
        Unreachable: it does not hold then, so that nobody can connect.
    """
    fingerprint, ends = tls.grouped(tls.fingerprint(pem)), trust.require_dates(pem, now)
    if ends - now < EXPIRY_NOTED:
        return note(
            "certificate",
            f"ends on {ends:%Y-%m-%d}",
            "ask the operator to renew the certificate that the coordinator was given, with the same key",
        )
    if first_use:
        return note(
            "certificate",
            f"never seen before; join will pin its key: {fingerprint}",
            "compare that with the fingerprint that `coordinator serve` prints",
        )
    return ok("certificate", f"its key is the one that is pinned: {fingerprint}; holds until {ends:%Y-%m-%d}")


async def clock(case: Case) -> Finding | None:
    return None if case.jobs is None or not case.jobs.now_unix else skew(case.skew)


def skew(seconds: float) -> Finding:
    """Whether a clock that is so far ahead of the coordinator's (behind, if negative) does harm.

    Raises:
        UsageError: deadlines would pass unseen, or before they have.
    """
    if abs(seconds) < SKEW_NOTED:
        return ok("clock", f"within {abs(seconds):.1f} s of the coordinator's")
    apart = f"{datetime.timedelta(seconds=round(abs(seconds)))} {'ahead of' if seconds > 0 else 'behind'}"
    if abs(seconds) < SKEW_STOPS:
        return note("clock", f"this machine's clock is {apart} the coordinator's", _set_clock())
    raise UsageError(
        f"this machine's clock is {apart} the coordinator's, so it would miss deadlines",
        hint=f"{_set_clock()}; or tell the operator, if the other one is wrong",
    )


def _set_clock() -> str:
    return _SET_CLOCK.get(sys.platform, "set the time by the network")


async def job(case: Case) -> Finding | None:
    if case.remote is None or case.jobs is None:
        return None
    try:
        offered = await case.remote.describe(case.job_name)
    except Refused as error:
        names = ", ".join(status.spec.name for status in case.jobs.jobs if status.takes_contributions)
        error.hint = f"--job with one of: {names}" if names else error.hint or "ask the operator for a job"
        raise
    job_check.check(offered)
    name = offered.spec.name
    case.job, box = offered, outbox.outbox(case.state, offered)
    case.done = box.trained() is not None or box.receipt() is not None
    if box.receipt() is not None:
        return ok("job", f"{name}: this machine's contribution is in")
    taking = any(status.takes_contributions for status in case.jobs.jobs if status.spec.name == name)
    if not taking:
        raise Refused(f"{name} takes no more contributions", hint=f"edge-client pull {name}")
    until = datetime.datetime.fromtimestamp(offered.deadline_unix + case.skew).astimezone()
    already = "; trained here already, join only sends it" if case.done else ""
    return ok("job", f"{name}: takes contributions until {until:%Y-%m-%d %H:%M}{already}")


async def base(case: Case) -> Finding | None:
    if case.done or (case.remote is None and case.model is None):
        return None
    if case.model is not None:
        files = checkpoint.model_files(case.model)
        if case.remote is None or case.job is None:
            return ok("base model", f"{case.model} holds one, of {len(files)} files; which, a job will say")
        case.base = await fetch_base(case.remote, case.job, case.state, case.model, Screen())
        return ok("base model", f"{case.model} is the job's")
    if case.remote is None or case.job is None:
        return None
    missing, called = disk.room(case.job, case.state, None).base, case.job.spec.model.base
    if not missing:
        case.base = outbox.model_folder(case.state, case.job)
        return ok("base model", f"{called} is here")
    case.base = Path(case.open_now.enter_context(tempfile.TemporaryDirectory(prefix="oneround-")))
    for artifact in case.job.base_files:
        if not artifact.name.endswith(".safetensors") and artifact.size <= SMALL_BYTES:
            await case.remote.download(case.job.spec.name, artifact, local_path(case.base, artifact), lambda _: None)
    return ok("base model", f"{called}: {human_size(missing)} will come from the coordinator")


async def data(case: Case) -> Finding | None:
    if case.done:
        return None
    files.require(case.data, "edge-client doctor")
    spec = case.job.spec if case.job is not None else pb.JobSpec()
    rows = await asyncio.to_thread(load_rows, case.data, spec, skip_bad_rows=case.skip_bad_rows)
    says = f"{len(rows.train):,} rows to train on and {len(rows.held_out):,} held out, from {_files(len(rows.files))}"
    if case.job is None or case.base is None or case.backend is None:
        return _of_data(says, rows.skipped)
    case.prepared = await asyncio.to_thread(
        prepare, rows, case.base, spec, case.backend, skip_bad_rows=case.skip_bad_rows
    )
    return planned(case.prepared, says, spec.train.max_seq_len)


def planned(prepared: Prepared, says: str, max_seq_len: int) -> Finding:
    """What join would train on."""
    plan = prepared.plan
    says += f"; {plan.num_targets:,} target tokens, {plan.total_steps:,} steps"
    says += f"; the longest row has {prepared.longest:,}"
    if prepared.truncated:
        says += f"; {prepared.truncated:,} are cut at {max_seq_len} tokens"
    if prepared.dropped:
        says += f"; {prepared.dropped:,} have no answer left within {max_seq_len} tokens and are dropped"
    return _of_data(says, prepared.skipped, lost=prepared.truncated + prepared.dropped)


def _of_data(says: str, skipped: int, lost: int = 0) -> Finding:
    if skipped:
        says += f"; {skipped:,} bad rows are skipped"
    if lost or skipped:
        return note("data", says, "shorten or mend these rows, if they matter")
    return ok("data", says)


async def compatibility(case: Case) -> Finding | None:
    if case.prepared is None or case.backend is None:
        return None
    case.prepared.require_compatible()
    return ok("compatibility", f"{case.backend.name} computes what this base model's config.json says")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


async def room(case: Case) -> Finding:
    above = disk.existing(case.state)
    if not os.access(above, os.W_OK | os.X_OK):
        raise NotEnough(f"{above} cannot be written to", hint="give --state FOLDER")
    if case.job is not None:
        needed = disk.room(case.job, case.state, case.model)
        needed.require()
        return ok("disk", f"this job still needs {needed}, in {case.state}" if needed.needed else "nothing is needed")
    free = shutil.disk_usage(above).free
    if free < LITTLE_BYTES:
        return note("disk", f"only {human_size(free)} are free in {case.state}", "make room, or give --state FOLDER")
    return ok("disk", f"{human_size(free)} are free in {case.state}; how much is needed, a job will say")


async def memory(case: Case) -> Finding | None:
    if case.job is None or case.base is None or case.backend is None:
        return None
    setup = case.setup(case.backend)
    longest = case.prepared.longest if case.prepared is not None else None
    return outlook(estimate_memory(case.base, case.job, case.backend, longest, setup), case.job)


def outlook(expected: MemoryEstimate | None, job: pb.Job) -> Finding:
    """Whether training fits into memory, by an estimate that is rather too high."""
    if expected is None:
        return ok("memory", "how much this model needs cannot be told from its config.json")
    needed = f"training may take about {human_size(expected.needed)}"
    if expected.available is None:
        return ok("memory", f"{needed} of the device's own")
    if expected.short:
        return note(
            "memory",
            f"{needed}, and {human_size(expected.available)} are free",
            "close other programs; or ask the operator for a smaller train.batch_size "
            f"({job.spec.train.batch_size}) or train.max_seq_len ({job.spec.train.max_seq_len})",
        )
    parts = f" (a batch in {expected.setup.parts} parts)" if expected.setup.parts > 1 else ""
    return ok("memory", f"{needed}{parts}, and {human_size(expected.available)} are free")
