"""What a terminal, a log and a script see of the events. Each event by itself is in test_events.py."""

import json

import pytest

from edge_client.ui import events
from edge_client.ui.screen import Screen


def test_names_from_elsewhere_are_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().say(events.Joined("[red]x[/red]\x1b[2J", "s", "c"))
    said = capsys.readouterr().out
    assert "[red]x[/red]" in said and "\x1b" not in said


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen().bar("sending", 10) as advance:
        advance(1)
        advance(10, "done")
    assert capsys.readouterr().out.splitlines()[-1].startswith("sending 10/10 (100 %)")
    with Screen(as_json=True).bar("training", 10) as advance:
        advance(10, "loss 1.5", loss=1.5)
    said = json.loads(capsys.readouterr().out)
    assert (said["event"], said["what"], said["done"], said["total"], said["loss"]) == (
        "progress",
        "training",
        10,
        10,
        1.5,
    )
