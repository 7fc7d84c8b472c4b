"""Every promise in SECURITY.md names a test, and every test that it names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECURITY = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_is_named_is_there(file: str, test: str) -> None:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, functions)}
    assert test in defined, f"{file} has no {test}"


def test_every_promise_names_a_test() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", SECURITY.partition("## Promises")[2], flags=re.M)[2:]
    assert len(rows) > 10
    for promise, tests in rows:
        assert re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`(, `tests/[\w/]+\.py::test_\w+`)*", tests), promise
    assert len(NAMED) == len(set(NAMED)), "one test, one promise"
