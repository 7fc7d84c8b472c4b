"""The look for known vulnerabilities: quick and loud where nobody answers, a failure where there is one."""

import json
import socket
import time
from pathlib import Path

import pytest

from tests import audit

FOUND = {
    "dependencies": [
        {"name": "safe", "version": "1.0", "vulns": []},
        {"name": "unknown", "skip_reason": "not on PyPI"},
        {"name": "holed", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"]}]},
        {"name": "old", "version": "0.1", "vulns": [{"id": "GHSA-x", "fix_versions": []}]},
    ]
}


def test_what_is_found() -> None:
    lines, count = audit.vulnerable(json.dumps(FOUND))
    assert lines == ["holed 2.0: PYSEC-1, mended in 2.1, 3.0", "old 0.1: GHSA-x, mended in none"]
    assert count == 3, "the one that nobody knows is not counted as sound"
    with pytest.raises(ValueError):
        audit.vulnerable("No network")


@pytest.mark.parametrize("listens", [False, True])
def test_nobody_answers(listens: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither refused, nor taken and left waiting: soon over, said aloud, and no failure."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listens:
            server.close()
        began = time.monotonic()
        assert audit.main(f"http://127.0.0.1:{port}/pypi/pip/json") == 0
        assert time.monotonic() - began < audit.AUDIT_SECONDS / 2
    assert capsys.readouterr().out.startswith("AUDIT SKIPPED: http://127.0.0.1")


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>log in</html>", b'{"vulnerabilities": []}'])
def test_a_mirror_that_knows_of_no_vulnerability_is_no_answer(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "json").write_bytes(body)
    assert not audit.answers((tmp_path / "json").as_uri())
    (tmp_path / "json").write_bytes(b'{"vulnerabilities": [{"id": "PYSEC-1"}]}')
    assert audit.answers((tmp_path / "json").as_uri())


def test_every_pin_is_exact() -> None:
    """Which is what pip-audit asks for, and what makes an answer mean anything."""
    lines = Path(audit.PINS).read_text().split()
    assert lines and all(line.count("==") == 1 for line in lines)
    assert lines == sorted(lines, key=str.lower)
