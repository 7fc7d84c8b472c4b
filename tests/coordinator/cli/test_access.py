"""Letting people in from the command line: the printed line is pasted on the other machine, and that is all."""

import json
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import coordinator.cli.app
import edge_client.cli.app
from coordinator.auth import identity
from edge_client.connection.identity import Pins, me
from oneround import invitation
from oneround.errors import OneroundError
from tests import authorities, commands
from tests.daemons import BASE
from tests.waiting import LONG

JOB = """
name = "{who}-notes"
[model]
base = "{base}"
[lora]
rank = 2
[train]
epochs = 30
[access]
who = "{who}"
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A job for token holders and one for the approved; the daemon's state folder, and its address."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "data.txt").write_text("for line in file:\n    print(line)\n" * 800)
    with commands.coordinator(folder / "state") as address:
        for who in ("token", "approved"):
            (folder / f"{who}.toml").write_text(JOB.format(who=who, base=BASE))
            commands.run("coordinator", "submit", folder / f"{who}.toml", "--state", folder / "state")
        yield folder / "state", address


def ran(app: typer.Typer, *arguments: object, code: int = 0) -> str:
    """What a command prints in this process, or its error and the way out; starting one takes a second or more."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error, found = result.exception, result.exit_code
    if isinstance(error, OneroundError):
        found = error.exit_code
    elif error is not None and not isinstance(error, SystemExit):
        raise error
    assert found == code, (result.output, error)
    return f"{result.output}{error}\n{error.hint}" if isinstance(error, OneroundError) else result.output


def operator(served: tuple[Path, str], *arguments: object, code: int = 0) -> str:
    return ran(coordinator.cli.app.app, *arguments, "--state", served[0], code=code)


def client(*arguments: object, code: int = 0) -> str:
    return ran(edge_client.cli.app.app, *arguments, code=code)


def listed(served: tuple[Path, str], *arguments: object) -> list[dict[str, Any]]:
    (rows,) = json.loads(operator(served, *arguments, "--json")).values()
    return rows  # type: ignore[no-any-return]


def pasted(printed: str) -> list[str]:
    """The words of the line that is to be pasted."""
    (line,) = [line for line in printed.splitlines() if line.startswith("edge-client join")]
    name, *words = shlex.split(line)
    assert name == "edge-client" and len(words) == 2
    return words


def test_a_token_from_its_making_to_its_end(served: tuple[Path, str], tmp_path: Path) -> None:
    state, address = served
    data = ("--data", state.parent / "data.txt")
    printed = operator(served, "token", "create", "token-notes", "--note", "ward 3", "--expires", "24h")
    assert "lets one machine into token-notes, until" in printed
    join = pasted(printed)
    said = invitation.read(join[1])
    assert (said.server, said.fingerprint) == (address, identity.load_or_create(state).fingerprint)
    (token,) = listed(served, "token", "list")
    assert (token["note"], token["uses"], token["used"], token["revoked"]) == ("ward 3", 1, 0, False)
    assert said.token not in json.dumps(token), "it is shown once"

    # It is pasted; nobody is asked about the key, and which job is meant is known.
    said_there = client(*join, *data, "--state", tmp_path / "alice", code=2)
    assert "add --yes" in said_there and "token-notes" in said_there
    assert Pins(tmp_path / "alice").all() == {address: said.fingerprint}
    shown = operator(served, "token", "list")
    assert "ward 3" in shown and "1 of 1" in shown and "used up" in shown
    (known,) = listed(served, "clients", "--job", "token-notes")
    assert known["id"] == me(tmp_path / "alice").client_id[:12]
    assert [(each["job"], each["how"]) for each in known["passes"]] == [("token-notes", f"token {token['id']}")]

    # Another machine comes too late; who was there comes in again.
    err = client(*join, *data, "--state", tmp_path / "bob", code=3)
    assert "used by somebody else already" in err and "coordinator token create" in err
    err = client(*join, *data, "--state", tmp_path / "alice", code=2)
    assert "add --yes" in err
    words = ("join", "--server", address, "--job", "token-notes", *data, "--state", tmp_path / "bob")
    err = client(*words, code=3)
    assert "there is no job 'token-notes'" in err

    # A token that is ended.
    printed = operator(served, "token", "create", "--uses", "0", "--json")
    made = json.loads(printed)
    assert f"Token {made['id']} lets nobody in" in operator(served, "token", "revoke", made["id"])
    err = client("join", made["link"], *data, "--state", tmp_path / "carol", code=3)
    assert "was revoked" in err
    assert "there is no token" in operator(served, "token", "revoke", "00000000", code=3)
    assert "revoked" in operator(served, "token", "list")


def test_a_link_that_is_none(served: tuple[Path, str], tmp_path: Path) -> None:
    state, address = served
    common = ("--data", state.parent / "data.txt", "--state", tmp_path)
    good = json.loads(operator(served, "token", "create", "token-notes", "--json"))["link"]
    err = client("join", good[:-1], *common, code=2)
    assert "oneround://HOST:PORT/#TOKEN+FINGERPRINT" in err
    err = client("join", good, "--server", address, *common, code=2)
    assert "leave --server out" in err
    other = invitation.Invitation(address, invitation.read(good).token, "ab" * 32)
    err = client("join", str(other), *common, code=3)
    assert "another key" in err and not Pins(tmp_path).all()
    before = listed(served, "token", "list")
    for arguments in (("--expires", "400d"), ("--expires", "soon"), ("--address", "ward"), ("--uses", "-1")):
        operator(served, "token", "create", "token-notes", *arguments, code=2)
    operator(served, "token", "create", "nothing", code=3)
    assert listed(served, "token", "list") == before, "nothing is left of what was refused"


def test_a_client_that_asks(served: tuple[Path, str], tmp_path: Path) -> None:
    state, address = served
    words = ("join", "--server", address, "--job", "approved-notes", "--data", state.parent / "data.txt", "--yes")
    key = identity.load_or_create(state).fingerprint
    joins = (*words, "--name", "vera", "--state", tmp_path, "--trust", key, "--json")
    process = commands.start("edge-client", *joins)
    try:
        deadline = time.monotonic() + LONG
        while not (waiting := listed(served, "clients", "--job", "approved-notes")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.2)
        (vera,) = waiting
        assert (vera["name"], vera["id"]) == ("vera", me(tmp_path).client_id[:12])
        shown = operator(served, "clients")
        assert "approved-notes (has asked)" in shown
        (advice,) = re.findall(r"coordinator (clients approve .*)", shown)
        assert "may now take part in approved-notes (approved)" in operator(served, *shlex.split(advice))
        while not json.loads(operator(served, "show", "approved-notes", "--json"))["joined"]:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LONG)
    assert process.returncode == 130, err
    events = commands.events(out)
    assert events["asks"]["id"] == vera["id"] and events["joined"]["job"] == "approved-notes"

    assert "nothing but open jobs" in operator(served, "clients", "refuse", "vera", "--job", "approved-notes")
    assert "nothing: banned" in operator(served, "clients", "ban", vera["id"], "--why", "a lost laptop")
    assert "a lost laptop" in operator(served, "clients")
    err = client(*joins, code=3)
    assert "has banned this client" in err and vera["id"] in err
    assert "nothing but open jobs" in operator(served, "clients", "unban", "vera")
    assert "no client 'nobody'" in operator(served, "clients", "ban", "nobody", code=3)


def test_an_invitation_to_a_coordinator_with_its_operators_certificate(tmp_path: Path) -> None:
    key, state = authorities.new_key(), tmp_path / "state"
    (tmp_path / "key.pem").write_bytes(authorities.pem(key))
    (tmp_path / "tls.pem").write_bytes(authorities.authority("ca").signed(key, ["ward.example"]))
    files = ("--tls-certificate", tmp_path / "tls.pem", "--tls-key", tmp_path / "key.pem")
    (tmp_path / "data.txt").write_text("a line\n" * 100)
    (tmp_path / "job.toml").write_text(JOB.format(who="token", base=BASE))
    with commands.coordinator(state, *files, "--job", tmp_path / "job.toml"):
        out = ran(coordinator.cli.app.app, "token", "create", "--state", state)
        words = (*pasted(out), "--data", tmp_path / "data.txt", "--state", tmp_path / "client")
        err = client(*words, code=2)
        assert "add --yes" in err
    assert not (state / "key.pem").exists(), "no other key was made"
