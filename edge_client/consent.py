"""What `join` sends, in words, and whether the person agrees. Until then it signs in with its key, and
the token that it was given, and asks for jobs; no more.

An answer is kept with the job: it holds for the same job of the same coordinator, and for what was shown.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_client.outbox import Outbox
from edge_client.preflight import disk
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import rules, tls
from oneround.errors import NotFound, Refused, UsageError
from oneround.text import human_size, one_line
from oneround.v1 import federation_pb2 as pb

# All of it: a test holds these against every field of the protocol's messages, and against the adapter's file.
TO_JOIN = (
    "the name {name!r}; {platform}, {backend} on {device}; a public key that stands for this machine; and, as to "
    "any server, its network address"
)
MEANWHILE = (
    "every few seconds the step, how many there will be, the loss, and tokens per second; and which files of the base "
    "model are missing here"
)
AT_LAST = (
    "one LoRA adapter, rank {rank} in {dtype} (how many bytes is shown before training begins), with its size and "
    "SHA-256; the numbers of examples, target tokens and steps; the mean loss of the last epoch; and the fingerprints "
    "of base model, tokenizer and chat template, and of the initial adapter if A is frozen"
)


@dataclass(frozen=True)
class Terms:
    """What the person is asked to agree to. `key` and `announced`, a SHA-256 of all that the coordinator says of a job,
    tell it from another of its name, and from itself when it asks for something else."""

    job: str
    key: str
    announced: str
    to_join: str
    meanwhile: str
    at_last: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def choose_job(jobs: Sequence[pb.JobStatus], name: str) -> pb.JobStatus:
    """The job of this name, or the only one that is open.

    Raises:
        Refused: there is none, or there are several.
    """
    if name:
        named = next((job for job in jobs if job.spec.name == name), None)
        if named is None:
            names = one_line(", ".join(job.spec.name for job in jobs))
            raise NotFound(f"there is no job {name!r} here", hint=f"--job with one of: {names}" if names else "")
        return named
    open_jobs = {job.spec.name: job for job in jobs if job.takes_contributions}
    if not open_jobs:
        raise Refused("no job is open here", hint="coordinator submit JOB.toml, on the coordinator's machine")
    if len(open_jobs) > 1:
        names = one_line(", ".join(sorted(open_jobs)))
        raise Refused(f"several jobs are open here: {names}", hint="edge-client join --job, with one of them")
    return next(iter(open_jobs.values()))


def terms(job: pb.Job, request: pb.JoinRequest, key: str) -> Terms:
    """What will be sent when a request to join a job is, and after it."""
    machine = request.machine
    return Terms(
        job=job.spec.name,
        key=key,
        announced=hashlib.sha256(job.SerializeToString(deterministic=True)).hexdigest(),
        to_join=TO_JOIN.format(
            name=request.client_name, platform=machine.platform, backend=machine.backend, device=machine.device
        ),
        meanwhile=MEANWHILE,
        at_last=AT_LAST.format(rank=job.spec.lora.rank, dtype=job.spec.upload.dtype),
    )


@dataclass(frozen=True)
class Requirements:
    """What a job asks of this machine, in words: the base and where it comes from, what is trained, and the disk."""

    base: str
    trains: str
    takes: str


def requirements(job: pb.Job, machine: pb.Machine, state: Path, model: Path | None) -> Requirements:
    """What a job asks of a machine with this state folder, and perhaps a base of its own."""
    spec, room = job.spec, disk.room(job, state, model)
    where = f"yours, in {model}" if model else f"{human_size(room.base)} of it from the coordinator"
    train, start = spec.train, spec.lora.start_from
    going_on = f", going on from {start if rules.is_job_name(start) else 'an earlier adapter'}" if start else ""
    return Requirements(
        base=f"{spec.model.base}, {where if model or room.base else 'here already'}",
        trains=f"LoRA of rank {spec.lora.rank} on {len(job.modules)} modules, with {machine.backend} on "
        f"{machine.device}: {train.epochs:g} epochs in batches of {train.batch_size} × {train.max_seq_len} tokens"
        f"{going_on}",
        takes=f"{human_size(room.needed)} of the disk of {state}; how long, the bar says as soon as training begins",
    )


def agreed_before(boxes: Iterable[Outbox], *any_of: Terms) -> bool:
    """Whether the person has agreed to any of these terms before."""
    return not {box.consent() for box in boxes}.isdisjoint(terms.digest for terms in any_of)


async def ask(
    screen: Screen, terms: Terms, requirements: Requirements, *, server: str, deadline: float, data: Path, yes: bool
) -> bool:
    """Show what is asked for and what will be sent, and ask; with `yes` only show.

    Raises:
        UsageError: nobody is there to be asked.
    """
    screen.say(
        events.JobTerms(
            job=terms.job,
            to_join=terms.to_join,
            meanwhile=terms.meanwhile,
            at_last=terms.at_last,
            base=requirements.base,
            trains=requirements.trains,
            takes=requirements.takes,
            server=server,
            key=f"{tls.grouped(terms.key[:16])} …" if terms.key else "none, without TLS",
            until=time.strftime("%a %d %b %Y, %H:%M", time.localtime(deadline)),
            data=str(data),
        )
    )
    return await _agreed(screen, "Take part, and send this?", yes)


async def ask_standing(
    screen: Screen, request: pb.JoinRequest, accept: Sequence[str], *, server: str, data: Path, yes: bool
) -> bool:
    """The same for every job of these names that will ever appear, before any of them is known.

    Raises:
        UsageError: nobody is there to be asked.
    """
    machine = request.machine
    screen.say(
        events.StandingTerms(
            accept=" or ".join(accept),
            server=server or "the coordinator on this network",
            data=str(data),
            to_join=TO_JOIN.format(
                name=request.client_name, platform=machine.platform, backend=machine.backend, device=machine.device
            ),
            meanwhile=MEANWHILE,
            at_last=AT_LAST.format(rank="and size as the job says", dtype="its type"),
        )
    )
    return await _agreed(screen, "Take part in each of them by itself, and send this?", yes)


async def _agreed(screen: Screen, question: str, yes: bool) -> bool:
    if yes:
        return True
    if not screen.can_ask:
        raise UsageError(
            "you have to agree before anything is sent, and there is no terminal to ask you on",
            hint="add --yes, to agree to what is said above",
        )
    return await screen.ask(f"{question} \\[y/N]") in ("y", "yes")
