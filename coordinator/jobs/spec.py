"""A job, from its TOML file or from the wire, checked. The file's keys and defaults are those of JobSpec's proto."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from converters.gguf import types as gguf_types
from converters.updates import kinds
from coordinator import aggregate
from coordinator.auth import policy
from oneround import rules
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb


def read(path: Path) -> pb.JobSpec:
    """A checked spec from a TOML file. Paths in it are relative to the file.

    Raises:
        UsageError: the file is not there, is not TOML, or asks for what does not exist; the message names the key.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the job file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    try:
        spec = parse(table)
    except UsageError as error:
        raise UsageError(f"{path}: {error}", hint=error.hint) from error
    for key in ("base", "gguf"):
        value = getattr(spec.model, key)
        local = (path.parent / Path(value).expanduser()).resolve()
        if value and (local.exists() or key == "gguf" or is_path(value)):
            setattr(spec.model, key, str(local))
    update = kinds.settings(spec)
    if "/" in update.start_from:  # else it is a job's name
        update.start_from = str((path.parent / Path(update.start_from).expanduser()).resolve())
    return spec


def parse(table: Mapping[str, Any]) -> pb.JobSpec:
    """A checked spec, with every default filled in, from the keys and values of a job file."""
    spec = pb.JobSpec()
    _take(table, spec, "")
    return check(spec)


def check(spec: pb.JobSpec, clients: int | None = None) -> pb.JobSpec:
    """The same spec with every default filled in, if all of it makes sense; from a file or from the wire alike.

    `clients`: how many contributions the method will be given; where they are not in yet, the quorum.
    """
    spec = filled(spec)
    if not (targets := kinds.settings(spec).target_modules):
        targets.append("all-linear")
    if not spec.publish.gguf:
        spec.publish.gguf.extend(["f16", "q8_0"])
    invalid = rules.broken(spec, kinds.kind_of(spec).rules_of(spec)) or rules.first_broken(
        spec,
        [
            ("aggregate.method", spec.aggregate.method in aggregate.METHODS, rules.one_of(aggregate.METHODS)),
            *(
                (f"aggregate.{name}", holds(getattr(spec.aggregate, name)), expected)
                for name, (holds, expected) in aggregate.PARAMETERS.items()
            ),
            (
                "publish.gguf",
                set(spec.publish.gguf) <= set(gguf_types.NAMES),
                "a list of " + rules.one_of(gguf_types.NAMES),
            ),
            ("admission.max_num_examples", 1 <= spec.admission.max_num_examples <= 1 << 40, "1 or more"),
            ("admission.clip", spec.admission.clip == 0 or 1 <= spec.admission.clip <= 1e6, "0, or 1 or more"),
            ("admission.outlier", 0 <= spec.admission.outlier <= 1e6, "0 or more"),
            ("admission.min_cosine", -1 <= spec.admission.min_cosine <= 1, "-1 to 1"),
            ("access.who", spec.access.who in policy.JOB_ACCESS, rules.one_of(policy.JOB_ACCESS)),
            ("publish.adapter_rank", spec.publish.adapter_rank <= 65536, "0 to 65536"),
        ],
    )
    if invalid:
        raise UsageError(invalid)
    _check_method(spec, clients)
    return spec


def _check_method(spec: pb.JobSpec, clients: int | None) -> None:
    """Refuse what a method cannot take, before anybody trains."""
    method, kind = aggregate.METHODS[spec.aggregate.method], kinds.kind_of(spec)
    defaults = pb.AggregateSpec()
    for name in aggregate.PARAMETERS.keys() - {"server_learning_rate", *method.parameters}:
        if getattr(spec.aggregate, name) != getattr(defaults, name):
            users = (user for user, other in aggregate.METHODS.items() if name in other.parameters)
            raise UsageError(
                f"aggregate.{name} is set, and {spec.aggregate.method} does not use it",
                hint=f"leave it out; it is for {' and '.join(users)}",
            )
    another = "another method, such as exact" if clients is None else "--method exact takes any"
    if missing := [name for name in method.statistics if name not in kind.STATISTICS]:
        raise UsageError(
            f"{spec.aggregate.method} needs {' and '.join(missing)} of every client, which nobody can send beside"
            f" {kind.MODULE.kind} updates",
            hint=another,
        )
    count = spec.round.min_clients if clients is None else clients
    if why := aggregate.unfit(spec.aggregate, clients=count, kind=kind.MODULE, frozen_a=kind.is_partial(spec)):
        least = method.min_clients(spec.aggregate)
        raise_it = f"round.min_clients = {least}, or fewer byzantine_clients"
        raise UsageError(why, hint=raise_it if clients is None and count < least else another)


def is_path(base: str) -> bool:
    """Whether a base that is not there can only be meant as a folder; hub ids look like `org/name`."""
    return rules.is_path(base)


def seconds(duration: str, key: str = "the duration") -> float:
    """Seconds in `90s`, `30m`, `24h` or `7d`."""
    if (number := rules.seconds(duration)) < 0:
        raise UsageError(f"{key} is {duration!r}; expected {rules.DURATION}")
    return number


def size(text: str, key: str = "the size") -> int:
    """Bytes in `500MB`, `50GB` or `1TB`; powers of ten, as disks are sold."""
    if (count := rules.size(text)) < 0:
        raise UsageError(f"{key} is {text!r}; expected {rules.SIZE}")
    return count


def _take(table: Mapping[str, Any], message: Message, prefix: str) -> None:
    """Set a message's fields from a table's keys; an unknown key or a value of another type is named in full."""
    fields = {field.name: field for field in message.DESCRIPTOR.fields}
    for key, value in table.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            where = f"[{prefix.rstrip('.')}]" if prefix else "the top level"
            raise UsageError(
                f"unknown key `{prefix}{key}`" + (f"; did you mean `{prefix}{close[0]}`?" if close else ""),
                hint=f"{where} takes {', '.join(fields)}",
            )
        field = fields[key]
        if field.message_type is not None:
            if not isinstance(value, Mapping):
                raise UsageError(f"`{prefix}{key}` is a table: write [{prefix}{key}] and its keys below")
            _choose(message, field)
            _take(value, getattr(message, key), f"{prefix}{key}.")
            continue
        if field.is_repeated and isinstance(value, str):
            value = [value]
        try:
            json_format.ParseDict({key: value}, message)
        except json_format.ParseError as error:
            raise UsageError(f"{prefix}{key} is {value!r}; expected {_expected(field)}") from error


def _choose(message: Message, field: Any) -> None:
    """A table is there, empty or not; of the tables of a oneof, such as the kinds of update, only one may be."""
    oneof = field.containing_oneof
    if oneof is not None and (other := message.WhichOneof(oneof.name)) not in (None, field.name):
        raise UsageError(f"a job has one of [{other}] and [{field.name}], not both", hint="leave one of the tables out")
    getattr(message, field.name).SetInParent()


def _expected(field: Any) -> str:
    """What a FieldDescriptor takes, in words."""
    kind = {
        FieldDescriptor.CPPTYPE_STRING: "text",
        FieldDescriptor.CPPTYPE_BOOL: "true or false",
        FieldDescriptor.CPPTYPE_DOUBLE: "a number",
        FieldDescriptor.CPPTYPE_UINT32: "a whole number, 0 or more",
        FieldDescriptor.CPPTYPE_UINT64: "a whole number, 0 or more",
    }[field.cpp_type]
    return f"a list of {kind}" if field.is_repeated else kind


def filled(spec: pb.JobSpec) -> pb.JobSpec:
    """A copy in which every default is written out, so that a stored job keeps its meaning if defaults change.

    A job from before a key was there means the key's default; of a oneof, such as the kind of update, only the member
    that is set is filled in.
    """
    copy = pb.JobSpec()
    copy.CopyFrom(spec)
    getattr(copy, kinds.name_of(copy)).SetInParent()

    def fill(message: Message) -> None:
        for field in message.DESCRIPTOR.fields:
            oneof = field.containing_oneof
            if field.is_repeated or (oneof is not None and message.WhichOneof(oneof.name) != field.name):
                continue
            if field.message_type is not None:
                getattr(message, field.name).SetInParent()
                fill(getattr(message, field.name))
            else:
                setattr(message, field.name, getattr(message, field.name))

    fill(copy)
    return copy
