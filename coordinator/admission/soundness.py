"""Whether an uploaded update may take part, looked at by itself. Bytes from a stranger: nothing is taken on trust.

Runs in a process of its own (worker.py). What only the cohort can tell is in outliers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converters import tensors
from converters.updates import kinds
from converters.updates.update import WIRE_DTYPES, Update, check
from coordinator.admission import unreadable
from coordinator.aggregate import METHODS
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Uploaded:
    """One contribution: what its client declared, and its file.

    `initial` is the job's initial update, which completes one that was sent in part.
    """

    file: Path
    declaration: pb.Declaration
    job: pb.Job
    initial: Path | None = None

    @cached_property
    def update(self) -> Update[Any]:
        """What is in the file. Raises BadData when it is no update of the job's kind."""
        spec = self.job.spec
        return kinds.kind_of(spec).read(self.file, kinds.frozen(spec, self.initial))


Check = Callable[[Uploaded], str]  # a reason why it cannot take part; empty if there is none. May raise BadData.


def _initial(uploaded: Uploaded) -> str:
    """Where a part of the initial update was frozen: that of this job."""
    kind, job = kinds.kind_of(uploaded.job.spec), uploaded.job
    if not kind.is_partial(job.spec) or uploaded.initial is None:
        return ""
    return kind.astray(uploaded.update, job.initial.digest)


def _layout(uploaded: Uploaded) -> str:
    """Names and shapes of modules, and that all numbers are finite."""
    check(uploaded.update, kinds.shapes(uploaded.job.modules))
    return ""


def _rank(uploaded: Uploaded) -> str:
    """The job's rank; a smaller one where the method can take it, and no start is in the factors."""
    spec = uploaded.job.spec
    wanted = kinds.kind_of(spec).rank(spec)
    exactly = METHODS[spec.aggregate.method].needs_one_rank or bool(kinds.settings(spec).start_from)
    for name, rank in uploaded.update.ranks.items():
        if rank > wanted or (rank < wanted and exactly):
            return f"{name} has rank {rank}, the job asks for {wanted}"
    return ""


def _dtype(uploaded: Uploaded) -> str:
    """The dtype that the job asks for."""
    wanted = uploaded.job.spec.upload.dtype
    for name, tensor in tensors.read(uploaded.file)[0].items():
        if np.dtype(tensor.dtype) != WIRE_DTYPES[wanted]:
            return f"{name} is in {tensor.dtype}, the job asks for {wanted}"
    return ""


def _base(uploaded: Uploaded) -> str:
    """What it was trained over, as its header says."""
    base, expected = uploaded.update.metadata.get("base"), uploaded.job.base_fingerprint
    return "" if base == expected else f"trained over base {base}, the job's base is {expected}"


def _tokenizer(uploaded: Uploaded) -> str:
    """How its text became tokens, as its header says; of a job whose base has a tokenizer and a chat template."""
    header, job = uploaded.update.metadata, uploaded.job
    for key, expected in (("tokenizer", job.tokenizer), ("chat_template", job.chat_template)):
        if expected and header.get(key) != expected:
            words = key.replace("_", " ")
            return f"trained with another {words}: {header.get(key) or 'it names none'}, the job's is {expected}"
    return ""


def _declaration(uploaded: Uploaded) -> str:
    """Whether the numbers that were declared can be."""
    declaration, spec = uploaded.declaration, uploaded.job.spec
    examples, most = declaration.num_examples, spec.admission.max_num_examples
    if examples < 1:
        return "it declares no training examples"
    if examples > most:
        return f"it declares {examples} training examples; the job takes at most {most} of one client"
    train = spec.train
    # Packed, a step has room for the tokens of its batch of longest rows, and a row takes two at the least.
    at_once = train.batch_size * train.max_seq_len // 2 if train.packing else train.batch_size
    seen = declaration.steps * at_once
    if train.epochs >= 1 and declaration.steps and examples > seen:
        return f"it declares {examples} training examples, and its {declaration.steps} steps have room for {seen}"
    return ""


CHECKS: dict[str, Check] = {
    "initial": _initial,
    "layout": _layout,
    "rank": _rank,
    "dtype": _dtype,
    "base": _base,
    "tokenizer": _tokenizer,
    "declaration": _declaration,
}


def unsound(file: Path, declaration: pb.Declaration, job: pb.Job, initial: Path | None = None) -> str:
    """Why this contribution cannot take part, in one line; empty when it can. Never raises for what the file holds."""
    uploaded = Uploaded(file, declaration, job, initial)
    return next((reason for check in CHECKS.values() if (reason := judged(check, uploaded))), "")


def judged(check: Check, uploaded: Uploaded) -> str:
    """What a check says of a contribution, in one line that does not tell where the file lies."""
    try:
        return one_line(check(uploaded))
    except Exception as error:
        return unreadable.reason(error, uploaded.file)
