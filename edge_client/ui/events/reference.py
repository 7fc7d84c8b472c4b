"""docs/events.md, made from the classes: every event, and what the commands print that answer with JSON at once."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from edge_client.ui import rows
from edge_client.ui.events import connecting, contributing, joining, receipts, results, training, unattended
from edge_client.ui.events.event import Event

TOPICS = (connecting, joining, training, contributing, unattended, results, receipts)

_HEAD = """\
# What `edge-client --json` prints

Made from the code by `python -m edge_client.ui.events > docs/events.md`; a test holds it.

With `--json` a command prints a line of JSON for everything that happens: `{"event": "joined", "job": …}`. Names, keys
and the order of keys stay from version to version; new keys and events may be added, so ignore what you do not know. An
error is a sentence on standard error, and an exit code. Without `--json` each event is a sentence for people.
"""
_ROWS = """\
## Answers that are no events

`status` and `discover` print one list of objects; `doctor` prints a line for each check as it comes.
"""
_TYPES = {str: "string", int: "integer", float: "number", bool: "true or false", types.NoneType: "null"}


def document() -> str:
    """The whole page."""
    return "\n".join(line for part in (_head(), *map(_topic, TOPICS), _answers()) for line in part)


def _head() -> Iterator[str]:
    yield _HEAD


def _topic(module: ModuleType) -> Iterator[str]:
    yield f"## {_line(module.__doc__).rstrip('.')}\n\n| event | when | keys |\n|---|---|---|"
    for kind in _declared(module):
        if issubclass(kind, Event):
            yield f"| `{kind.event}` | {_line(kind.__doc__)} | {_keys(kind)} |"
    yield ""


def _answers() -> Iterator[str]:
    yield f"{_ROWS}\n| command | prints | keys |\n|---|---|---|"
    for kind in _declared(rows):
        command, _, meaning = _line(kind.__doc__).partition(": ")
        yield f"| {command} | {meaning} | {_keys(kind)} |"


def _declared(module: ModuleType) -> list[type]:
    """A module's own classes, in its order."""
    return [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]


def _keys(kind: type) -> str:
    return "<br>".join(f"`{name}`: {words}" for name, words in _fields(kind))


def _fields(kind: type) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        optional = "; left out where there is none" if field.default is not MISSING else ""
        yield field.name, f"{_words(hints[field.name], left_out=bool(optional))}{optional}"


def _words(hint: Any, *, left_out: bool = False) -> str:
    """A type, in words."""
    if get_origin(hint) is Annotated:
        bare, *notes = get_args(hint)
        return f"{_words(bare)} ({', '.join(notes)})"
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(_words(kind) for kind in get_args(hint) if not (left_out and kind is types.NoneType))
    if get_origin(hint) is Literal:
        return " or ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_words(get_args(hint)[0])}"
    if is_dataclass(hint):
        return "object: " + ", ".join(f"`{name}` {words}" for name, words in _fields(hint))  # type: ignore[arg-type]
    return _TYPES[hint]


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
