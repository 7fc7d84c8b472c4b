"""What people get wrong: a clear sentence, the way out, the documented exit code, and never a traceback."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_client.connection import discovery
from tests import commands

BASE = Path(__file__).parents[1] / "benchmarks" / "base"
JOB = f'name = "notes"\n[model]\nbase = "{BASE}"\n'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "job.toml").write_text(JOB)
    with commands.coordinator(folder / "coordinator") as address:
        commands.run("coordinator", "submit", folder / "job.toml", "--state", folder / "coordinator")
        yield folder, address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (JOB + "[train]\nepoch = 3\n", "unknown key `train.epoch`; did you mean `train.epochs`?"),
        (JOB + "[round]\ndeadline = 'soon'\n", "round.deadline is 'soon'"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_wrong_job_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    _, err = commands.run("coordinator", "submit", tmp_path / "job.toml", "--state", tmp_path, code=2)
    assert says in err
    _, err = commands.run("coordinator", "serve", "--job", tmp_path / "job.toml", "--state", tmp_path, code=2)
    assert says in err


def test_a_base_that_is_not_there(served: tuple[Path, str]) -> None:
    folder, _ = served
    (folder / "other.toml").write_text('name = "other"\n[model]\nbase = "/models/none"\n')
    _, err = commands.run("coordinator", "submit", folder / "other.toml", "--state", folder / "coordinator", code=5)
    assert "the base model /models/none is not there" in err and "Try:" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "there is no file or folder"),
        ("empty.jsonl", "", "empty.jsonl"),
        ("broken.jsonl", '{"text": "fine"}\n{"text": \n', "broken.jsonl:2"),
        ("rows.jsonl", '{"txet": "typo"}\n', "rows.jsonl:1"),
        ("picture.png", "\x89PNG", "picture.png"),
    ],
)
def test_data_that_cannot_be_used(served: tuple[Path, str], name: str, content: str | None, says: str) -> None:
    folder, address = served
    if content is not None:
        (folder / name).write_text(content, "utf-8")
    join = ("join", "--yes", "--server", address, "--data", folder / name, "--state", folder / "client")
    _, err = commands.run("edge-client", *join, code=5)
    assert says in err


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("some text\n" * 100)
    join = ("join", "--yes", "--server", "127.0.0.1:1", "--data", tmp_path / "data.txt", "--state", tmp_path)
    _, err = commands.run("edge-client", *join, code=4)
    assert "no coordinator answers at 127.0.0.1:1" in err
    _, err = commands.run("coordinator", "jobs", "--state", tmp_path, code=4)
    assert "coordinator serve" in err


async def test_commands_that_need_a_server_say_so(tmp_path: Path) -> None:
    _, err = commands.run("edge-client", "chat", tmp_path / "none.gguf", "--state", tmp_path, code=2)
    assert "neither a GGUF file nor a job's name" in err
    if await discovery.look():
        pytest.skip("a coordinator makes itself known on this network, and these commands would ask it")
    _, err = commands.run("edge-client", "pull", "notes", "--state", tmp_path, "--to", tmp_path, code=4)
    assert "--server HOST:PORT" in err
    _, err = commands.run("edge-client", "chat", "notes", "--state", tmp_path, code=4)
    assert "--server HOST:PORT" in err


def test_a_job_that_is_not_there_and_a_model_that_is_another(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "data.txt").write_text("some text\n" * 100)
    join = ("join", "--yes", "--server", address, "--data", folder / "data.txt", "--state", folder / "client")
    _, err = commands.run("edge-client", *join, "--job", "nothing", code=3)
    assert "there is no job 'nothing'" in err
    _, err = commands.run("edge-client", *join, "--model", folder, code=5)
    assert "is not the job's base model" in err


@pytest.mark.parametrize("arguments", [("join", "--sevrer", "host:1"), ("joni",), ("chat",)])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    _, err = commands.run("edge-client", *arguments, code=2)
    assert "Usage: edge-client" in err


def test_interrupted_training_says_how_to_go_on(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "long.txt").write_text("for line in file:\n    print(line)\n" * 5000)
    data = ("--data", folder / "long.txt", "--state", folder / "client")
    client = commands.start("edge-client", "join", "--yes", "--server", address, *data, "--json")
    assert client.stdout is not None
    for line in client.stdout:
        if '"tokens_per_second"' in line:
            break
    client.send_signal(signal.SIGINT)
    _, err = commands.finish(client, code=130)
    assert f"To go on:\n  edge-client join --yes --server {address} --data {folder / 'long.txt'}" in err


def test_one_daemon_a_state_folder(served: tuple[Path, str]) -> None:
    folder, _ = served
    _, err = commands.run("coordinator", "serve", "--listen", "127.0.0.1:0", "--state", folder / "coordinator", code=2)
    assert "another coordinator is at work" in err


@pytest.mark.parametrize("address", ["host", ":5", "127.0.0.1:http", "127.0.0.1:99999", "[::1]:"])
def test_addresses_that_are_none(tmp_path: Path, address: str) -> None:
    _, err = commands.run("coordinator", "serve", "--listen", address, "--state", tmp_path, code=2)
    assert "--listen HOST:PORT" in err
    _, err = commands.run("edge-client", "pull", "notes", "--server", address, "--state", tmp_path, code=2)
    assert "is not HOST:PORT" in err


def test_a_base_gguf_that_is_not_of_the_base(served: tuple[Path, str]) -> None:
    folder, _ = served
    (folder / "not.gguf").write_bytes(b"not a gguf" * 100)
    (folder / "third.toml").write_text(f'name = "third"\n[model]\nbase = "{BASE}"\ngguf = "not.gguf"\n')
    _, err = commands.run("coordinator", "submit", folder / "third.toml", "--state", folder / "coordinator", code=5)
    assert "not.gguf is not a sound GGUF file" in err


def test_insecure_is_for_loopback(tmp_path: Path) -> None:
    serve = ("serve", "--listen", "0.0.0.0:0", "--insecure", "--state", tmp_path)
    _, err = commands.run("coordinator", *serve, code=2)
    assert "--insecure is for loopback" in err


def test_nothing_is_published_yet(served: tuple[Path, str]) -> None:
    folder, address = served
    pull = ("pull", "notes", "--server", address, "--state", folder / "client", "--to", folder / "out")
    _, err = commands.run("edge-client", *pull, code=3)
    assert "has published nothing yet; it is open" in err


def test_scripts_get_json(served: tuple[Path, str]) -> None:
    folder, _ = served
    out, _ = commands.run("coordinator", "jobs", "--state", folder / "coordinator", "--json")
    assert [found["spec"]["name"] for found in json.loads(out)["jobs"]] == ["notes"]
    out, _ = commands.run("coordinator", "show", "notes", "--state", folder / "coordinator", "--json")
    assert json.loads(out)["state"] == "STATE_OPEN"
