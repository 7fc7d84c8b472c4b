"""What a job may ask for: the rules that both ends hold a JobSpec to, from a file or from the wire.

What a coordinator does with contributions, and whom it takes them from, is its own business, and its rules are
in coordinator/jobs/spec.py. Everything here becomes a path, a loop's bound or a size on somebody else's machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from oneround import stream
from oneround.v1 import federation_pb2 as pb

SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
DURATION = "a number and a unit, as 90s, 30m, 24h or 7d"
SIZE = "a number and a unit, as 500MB, 50GB or 1TB"
YEAR_10000 = 253_402_300_800.0  # seconds since the Unix epoch; no calendar here goes on after it

JOB_NAME = r"[a-z0-9][a-z0-9._-]{0,62}"  # it becomes part of paths
MODULE_NAME = r"[A-Za-z0-9_.-]{1,200}"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Rule = tuple[str, object, str]  # a key, whether it holds, and what is expected


def broken(spec: pb.JobSpec, of_update: Iterable[Rule]) -> str:
    """The first rule that a spec breaks, as `lora.rank is 0; expected 1 to 1024`; empty when it keeps them all.

    `of_update`: the rules of its kind of update, which stand with the kind (converters/updates).
    """
    model, train, round_, upload = spec.model, spec.train, spec.round, spec.upload
    clients = max(round_.min_clients, round_.target_clients)
    return first_broken(
        spec,
        [
            ("name", is_job_name(spec.name), "1 to 63 lower-case letters, digits, `-`, `_` or `.`"),
            (
                "model.base",
                0 < len(model.base) <= 4096 and model.base.isprintable(),
                "a Hugging Face hub id or a folder",
            ),
            ("model.revision", len(model.revision) <= 200 and model.revision.isprintable(), "a branch, tag or commit"),
            ("model.gguf", len(model.gguf) <= 4096 and model.gguf.isprintable(), "a file"),
            *of_update,
            ("train.epochs", 0 < train.epochs <= 1000, "more than 0 and at most 1000"),
            ("train.learning_rate", 0 < train.learning_rate <= 10, "more than 0 and at most 10"),
            ("train.schedule", train.schedule in SCHEDULES, one_of(SCHEDULES)),
            ("train.warmup_ratio", 0 <= train.warmup_ratio < 1, "0 or more and less than 1"),
            ("train.batch_size", 1 <= train.batch_size <= 65536, "1 to 65536"),
            ("train.max_seq_len", 2 <= train.max_seq_len <= 1 << 20, "2 to 1048576"),
            ("train.seed", train.seed < 1 << 32, "less than 2³²"),
            ("round.min_clients", 1 <= round_.min_clients <= 1_000_000, "1 or more"),
            (
                "round.target_clients",
                round_.target_clients == 0 or round_.target_clients >= round_.min_clients,
                "0, or at least round.min_clients",
            ),
            ("round.deadline", 1 <= seconds(round_.deadline) <= 366 * 86400, f"1s to 366d: {DURATION}"),
            ("round.grace", not round_.grace or seconds(round_.grace) >= 0, DURATION),
            (
                "round.renew_every",
                not round_.renew_every or seconds(round_.renew_every) >= 1,
                f"1s or more: {DURATION}",
            ),
            (
                "round.max_clients",
                round_.max_clients >= clients,
                "at least round.min_clients and round.target_clients",
            ),
            ("upload.quota", size(upload.quota) > 0, f"more than 0: {SIZE}"),
            ("upload.dtype", upload.dtype in DTYPES, one_of(DTYPES)),
        ],
    )


def first_broken(spec: pb.JobSpec, rules: Iterable[Rule]) -> str:
    """The first of these rules that does not hold, in words; empty when all do."""
    return next(
        (f"{key} is {_shown(spec, key)}; expected {expected}" for key, holds, expected in rules if not holds), ""
    )


def is_job_name(text: str) -> bool:
    """Whether a job can be called so, and what it publishes be named after it on every disk."""
    return re.fullmatch(JOB_NAME, text) is not None and stream.is_name(f"{text}-f16.gguf")


def is_path(base: str) -> bool:
    """Whether a base that is not there can only be meant as a folder; hub ids look like `org/name`."""
    return base.startswith((".", "/", "~")) or base.count("/") != 1


def is_start(text: str) -> bool:
    """Whether a job can start from this: nothing, an earlier job's name, or a path, which has a slash."""
    return not text or is_job_name(text) or ("/" in text and len(text) <= 4096 and text.isprintable())


def is_time(unix: float) -> bool:
    """Whether a number of seconds since the Unix epoch is a time that a calendar has."""
    return 0 <= unix < YEAR_10000


def seconds(duration: str) -> float:
    """Seconds in `90s`, `30m`, `24h` or `7d`; -1 in anything else."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", duration)
    return float(match[1]) * _UNITS[match[2]] if match else -1.0


def size(text: str) -> int:
    """Bytes in `500MB`, `50GB` or `1TB`, powers of ten, as disks are sold; -1 in anything else."""
    match = re.fullmatch(r"([0-9]{1,6}) ?([kMGT])B", text)
    return int(match[1]) * _BYTES[match[2]] if match else -1


def one_of(names: Iterable[str]) -> str:
    return ", ".join(names)


def _shown(spec: pb.JobSpec, key: str) -> str:
    """A value for a message: short, whatever it is."""
    value: Any = spec
    for part in key.split("."):
        value = getattr(value, part)
    text = repr(value if isinstance(value, str | int | float) else list(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
