"""A job as it came over the wire, held against what it may say before any of it is used."""

from __future__ import annotations

import re

from converters import checkpoint
from converters.updates import kinds, sizes
from oneround import rules, stream
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb

_MOST_FEATURES = 1 << 24


def check(job: pb.Job) -> None:
    """Hold a job against the rules of job files, and what it was resolved to against the job; parts of it become paths,
    loop bounds and sizes.

    Raises:
        BadData: it says something else.
    """
    of_update = kinds.kind_of(job.spec).rules_of(job.spec)
    why = rules.broken(job.spec, of_update) or _modules(job) or _files(job)
    if not why and not re.fullmatch(r"[0-9a-f]{32}", job.id):
        why = "its id is none"
    if not why and not rules.is_time(job.deadline_unix):
        why = f"its deadline is {job.deadline_unix}, which is no time"
    if why:
        raise BadData(f"the coordinator announced a job that makes no sense: {why}", hint="tell the person who runs it")


def _modules(job: pb.Job) -> str:
    names = {module.name for module in job.modules}
    if not names or len(names) != len(job.modules) or not all(re.fullmatch(rules.MODULE_NAME, name) for name in names):
        return "its modules have no names, or one name twice"
    if not all(
        1 <= features <= _MOST_FEATURES
        for module in job.modules
        for features in (module.in_features, module.out_features)
    ):
        return f"a module has no features, or more than {_MOST_FEATURES:,}"
    if job.initial.size > sizes.most_initial_bytes(job):
        return "the adapter to begin with is larger than its rank"
    return kinds.unannounced(job)


def _files(job: pb.Job) -> str:
    for file in (job.initial, *job.base_files):
        if not stream.is_digest(file.digest):
            return f"a file, {file.name[:80]!r}, has no SHA-256"
    for file in job.base_files:
        if not stream.is_name(file.name) or not checkpoint.is_model_file(file.name):
            return f"{file.name[:80]!r} is none of a base model's files: settings, a tokenizer, weights as safetensors"
    if not stream.are_apart(job.base_files):
        return "two of the base model's files have one name"
    if job.base_fingerprint != stream.fingerprint(job.base_files):
        return "its base model's fingerprint is not that of the files"
    return ""
