"""Whether an uploaded adapter may take part, looked at by itself. Bytes from a stranger: nothing is taken on trust.

Runs in a process of its own (worker.py). What only the cohort can tell is in outliers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters import adapter, tensors
from converters.adapter import WIRE_DTYPES, Shape
from coordinator.aggregate import METHODS
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb


def unsound(file: Path, declaration: pb.Declaration, job: pb.Job, initial: Path | None = None) -> str:
    """Why this contribution cannot take part; empty when it can.

    Module names, shapes, ranks, dtype, finiteness, what it was trained over, and the declared numbers. `initial` is the
    job's initial adapter, whose A goes with the B that comes in where A is frozen.
    """
    try:
        frozen = adapter.read(initial) if job.spec.lora.freeze_a and initial else None
        uploaded = adapter.read(file, frozen)
        if frozen and uploaded.metadata.get(adapter.FROZEN_A) != job.initial.digest:
            return (
                f"A is frozen in this job: only B is taken, with {adapter.FROZEN_A}={job.initial.digest} in its header"
            )
        adapter.check(uploaded, {module.name: Shape(module.out_features, module.in_features) for module in job.modules})
        views, _ = tensors.read(file)
    except BadData as error:
        return str(error).replace(str(file), "the upload")
    rank = job.spec.lora.rank
    all_of_it = METHODS[job.spec.aggregate.method].one_rank or bool(job.spec.lora.start_from)
    for name, found in uploaded.ranks.items():
        if found > rank or (found < rank and all_of_it):
            return f"{name} has rank {found}, the job asks for {rank}"
    dtype = WIRE_DTYPES[job.spec.upload.dtype]
    for name, tensor in views.items():
        if np.dtype(tensor.dtype) != dtype:
            return f"{name} is in {tensor.dtype}, the job asks for {job.spec.upload.dtype}"
    return _trained_elsewhere(uploaded.metadata, job) or _absurd(declaration, job.spec)


def _trained_elsewhere(said: Mapping[str, str], job: pb.Job) -> str:
    base = said.get("base")
    if base != job.base_fingerprint:
        return f"trained over base {base}, the job's base is {job.base_fingerprint}"
    for what, expected in (("tokenizer", job.tokenizer), ("chat_template", job.chat_template)):
        if expected and said.get(what) != expected:
            words = what.replace("_", " ")
            return f"trained with another {words}: {said.get(what) or 'it names none'}, the job's is {expected}"
    return ""


def _absurd(declaration: pb.Declaration, spec: pb.JobSpec) -> str:
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
