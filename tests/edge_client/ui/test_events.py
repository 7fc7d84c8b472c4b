"""The events as a public interface: each is a sentence and a line of JSON, is reported somewhere, and is documented."""

import ast
import dataclasses
import json
import re
import string
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from edge_client.ui import events, rows
from edge_client.ui.events import EVENTS, Event, reference
from edge_client.ui.screen import Screen

ROOT = Path(__file__).parents[3]
CODE = [file for file in (ROOT / "edge_client").rglob("*.py") if file.parent.name != "events"]

# The interface as it stands: the names and keys that scripts rely on, in their order. Only ever add.
KEYS = {
    "adapter_fits": "file",
    "anew": "",
    "asks": "job id name",
    "base_gguf": "file",
    "chosen": "name reason needs total needs_bytes total_bytes fit",
    "continued": "step steps",
    "declined": "",
    "done": "job",
    "evaluated": "sentence helped job version file tokens examples base own published published_minus",
    "folder": "folder",
    "found": "name server",
    "full": "available",
    "halved": "step parts checkpointing",
    "joined": "job server client",
    "key_changed": "server before now",
    "left": "job",
    "left_alone": "job",
    "linger": "",
    "measuring": "models examples tokens",
    "memory": "needed_gb available_gb",
    "moved": "before server",
    "no_part": "job why again",
    "no_receipt": "of",
    "not_installed": "file",
    "not_kept": "why",
    "offline": "why version",
    "parts": "parts checkpointing",
    "paused": "reason why until",
    "pending": "job",
    "pinned": "server fingerprint",
    "plan": "base rank modules send_bytes examples tokens held_out steps backend device rounding",
    "progress": "what done total seconds_left loss tokens_per_second",
    "published": "job version",
    "pulled": "name size",
    "receipt": "size digest",
    "receipt_by_anyone": "fingerprint",
    "receipt_holds": "job job_id client digest size received received_unix by fingerprint",
    "receipt_kept": "job job_id client digest size received received_unix by file",
    "resumed": "folder",
    "retry": "why seconds",
    "service": "file accept server data when",
    "service_runs": "log",
    "service_waits": "why commands",
    "serving": "model url has_chat_template",
    "several": "rows",
    "signed": "version fingerprint",
    "signed_by_anyone": "version",
    "skipped": "skipped",
    "standing": "accept server data to_join meanwhile at_last",
    "staying": "server accept",
    "takes_no_part": "version job weight why",
    "takes_part": "version job weight why",
    "tells": "version base_loss own_loss published_loss tokens",
    "terms": "job to_join meanwhile at_last base trains takes server key until data",
    "tight": "available",
    "told": "job",
    "too_large": "available",
    "trained": "steps seconds loss",
    "truncated": "truncated dropped max_seq_len",
    "trusted": "server fingerprint",
    "uninstalled": "file",
    "unknown": "server fingerprint",
    "unpaused": "seconds",
    "unpinned": "server fingerprint",
    "unsigned": "version",
    "waiting": "state",
}


def example(kind: Any) -> Any:
    """An instance of a dataclass, with a value of each field's type."""
    hints = get_type_hints(kind)
    return kind(**{field.name: value(hints[field.name]) for field in dataclasses.fields(kind)})


def value(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return value(get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return example(hint)
    return {str: "[red]word[/red]\x1b[2J", int: 7, float: 0.5, bool: True}[hint]


def test_names_and_keys_stay() -> None:
    known = {name: [field.name for field in dataclasses.fields(kind)] for name, kind in EVENTS.items()}
    assert known == {name: keys.split() for name, keys in KEYS.items()}


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_is_a_sentence_and_a_line_of_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    event = example(EVENTS[name])
    Screen().say(event)
    sentence = capsys.readouterr().out
    assert sentence.strip() and "{" not in sentence and "\x1b" not in sentence
    Screen(as_json=True).say(event)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.isascii()
    assert json.loads(line) == {"event": name, **dataclasses.asdict(event)}
    assert list(json.loads(line)) == ["event", *KEYS[name].split()]


@pytest.mark.parametrize("name", EVENTS)
def test_every_placeholder_is_a_field_or_a_property(name: str) -> None:
    placeholders = {placeholder for _, placeholder, _, _ in string.Formatter().parse(EVENTS[name].template)}
    assert all(hasattr(example(EVENTS[name]), placeholder) for placeholder in placeholders - {None})


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_says_when_it_happens(name: str) -> None:
    assert EVENTS[name].__doc__ and not EVENTS[name].__doc__.startswith(EVENTS[name].__name__)


def test_what_has_no_value_is_left_out() -> None:
    progress = events.ProgressMade("sending", 1, 4, 3.0)
    assert progress.as_json() == {"what": "sending", "done": 1, "total": 4, "seconds_left": 3.0}
    assert "helped" in events.EVENTS["evaluated"].__annotations__
    unclear = dataclasses.replace(example(events.Evaluated), helped=None)
    assert unclear.as_json()["helped"] is None, "a key that is always there is null"


def test_two_events_cannot_have_one_name() -> None:
    with pytest.raises(TypeError, match="two events are called 'joined'"):
        type("Again", (Event,), {}, event="joined")


def said() -> set[str]:
    """The classes of events that the product makes somewhere."""
    names = set()
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "events":
                names.add(node.attr)
    return names


def test_every_event_is_reported_somewhere() -> None:
    # The screen itself reports progress.
    assert {kind.__name__ for kind in EVENTS.values()} - said() == {"ProgressMade"}


def test_nothing_else_is_reported() -> None:
    """mypy holds `say` to events; this holds every call to be seen by it: one argument, and no text."""
    calls = 0
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "say":
                calls += 1
                assert len(node.args) == 1 and not node.keywords, f"{file}:{node.lineno}"
                assert not isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}"
    assert calls > 50


def test_the_reference_is_fresh() -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    assert page == reference.document() + "\n", "python -m edge_client.ui.events > docs/events.md"
    assert set(re.findall(r"^\| `([a-z_]+)` \|", page, flags=re.M)) == {*EVENTS, "status", "discover", "doctor"}


def test_answers_that_are_no_events(capsys: pytest.CaptureFixture[str]) -> None:
    rows.print_list([rows.JoinedJob("a", "h:1", "contributed", 3, 9, "f")])
    (job,) = json.loads(capsys.readouterr().out)
    assert list(job) == ["job", "server", "stage", "examples", "bytes", "folder"]
    rows.print_list([rows.HeardCoordinator("n", ("h:1", "i:1"), "ab", True)])
    (heard,) = json.loads(capsys.readouterr().out)
    assert heard == {"name": "n", "addresses": ["h:1", "i:1"], "fingerprint": "ab", "known": True}
    rows.print_line(rows.CheckResult("disk", "ok", "fine", ""))
    line = capsys.readouterr().out
    assert line == '{"check": "disk", "level": "ok", "says": "fine", "hint": ""}\n'
