"""The same events as sentences and as JSON."""

import json
import string

import pytest

from edge_client.ui.screen import SENTENCES, Screen


def fields(event: str) -> dict[str, object]:
    """A value for every field of an event's sentence, of the kind that its format asks for."""
    parsed = string.Formatter().parse(SENTENCES[event])
    return {name: (7 if spec else "word") for _, name, spec, _ in parsed if name}


@pytest.mark.parametrize("event", SENTENCES)
def test_every_event_is_a_sentence_and_a_line_of_json(event: str, capsys: pytest.CaptureFixture[str]) -> None:
    Screen().say(event, **fields(event))
    said = capsys.readouterr().out
    assert said.strip() and "{" not in said
    Screen(as_json=True).say(event, **fields(event))
    assert json.loads(capsys.readouterr().out) == {"event": event, **fields(event)}


def test_names_from_elsewhere_are_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().say("joined", job="[red]x[/red]\x1b[2J", server="s", client="c")
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
