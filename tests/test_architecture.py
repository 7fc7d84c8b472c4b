"""docs/architecture.md is true: its picture is what the imports give, and every file that it names is there."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import architecture  # noqa: E402

PAGE = (DOCS / "architecture.md").read_text("utf-8")


def test_the_picture_is_fresh() -> None:
    assert (DOCS / "architecture.svg").read_text("utf-8") == architecture.svg(), "run python docs/architecture.py"


def test_rooms_import_in_no_circle() -> None:
    """`floors` raises where they do."""
    heights = architecture.floors(architecture.rooms())
    assert min(heights.values()) == 0 and heights["oneround.modules"] == 0


def test_the_two_programs_do_not_import_each_other() -> None:
    for name, targets in architecture.rooms().items():
        houses = {name.split(".")[0], *(target.split(".")[0] for target in targets)}
        assert not {"coordinator", "edge_client"} <= houses, name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+/(?:\w+\.\w+)?)`", PAGE))))
def test_a_place_that_is_named_is_there(name: str) -> None:
    below = [ROOT, ROOT / "proto", *(ROOT / house for house in architecture.HOUSES)]
    assert any((folder / name).exists() for folder in below), name
