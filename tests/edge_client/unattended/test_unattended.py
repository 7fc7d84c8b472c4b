"""A client that stays: jobs that appear, coordinators that are away, and the files that start it."""

import asyncio
import json
import math
import os
import plistlib
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

import edge_client.cli.app
from coordinator.daemon import Daemon
from coordinator.jobs import spec as job
from edge_client import outbox
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.connection.remote import Remote
from edge_client.unattended import service, watch
from edge_client.unattended.watch import RetryLater
from oneround.errors import BadData, NotEnough, Refused, Unreachable
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.commands import script
from tests.daemons import SPEC, running
from tests.fakes import FakeBackend
from tests.waiting import LONG, eventually
from tests.watching import Listening, at_work, quick_stay

ROOT = Path(__file__).parents[3]


# ---- which jobs, and when again ----


@pytest.mark.parametrize(
    ("patterns", "name", "accepted"),
    [
        (["notes"], "notes", True),
        (["notes"], "notes-2", False),
        (["clinic-*"], "clinic-notes", True),
        (["clinic-*"], "my-clinic-notes", False),
        (["a", "b*"], "b7", True),
        (["*"], "anything", True),
        (["ward-[12]"], "ward-3", False),
        (["Notes"], "notes", False),
    ],
)
def test_accepted_names(patterns: list[str], name: str, accepted: bool) -> None:
    assert watch.accepts(patterns, name) == accepted


def test_what_failed_is_tried_again_ever_more_rarely() -> None:
    failed, waits = None, []
    for _ in range(9):
        failed = RetryLater.once_more(failed, BadData("a bad row"), now=100.0)
        waits.append(failed.again - 100.0)
    assert waits[:3] == [60, 120, 240] and waits[-1] == waits[-2] == 3600
    assert RetryLater.once_more(None, NotEnough("full"), 0.0).again == 60
    assert math.isinf(RetryLater.once_more(None, Refused("quarantined"), 0.0).again), "a no stays a no"


def spec(name: str) -> pb.JobSpec:
    return job.parse({**SPEC, "name": name})


async def test_each_accepted_job_once_as_it_appears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard, backend = Listening(capsys), FakeBackend()

    async def joined(daemon: Daemon, name: str) -> int:
        return (await daemon.operator.status(name)).joined

    async with running(tmp_path / "one") as (daemon, address):
        async with at_work(quick_stay(address, tmp_path, backend)):
            await heard.until("staying")
            await daemon.operator.submit(spec("other"))
            await heard.until("left_alone", job="other")
            for name in ("ward-1", "ward-2"):
                await daemon.operator.submit(spec(name))
                await heard.until("done", job=name)
            await asyncio.sleep(0.5)
        assert backend.runs == 2 and await joined(daemon, "other") == 0
        assert [line["event"] for line in heard.said].count("left_alone") == 1
        async with at_work(quick_stay(address, tmp_path, backend)):  # as after a reboot
            await daemon.operator.submit(spec("ward-3"))
            await heard.until("done", job="ward-3")
        assert backend.runs == 3
        assert [line["job"] for line in heard.said if line["event"] == "joined"] == ["ward-1", "ward-2", "ward-3"]


async def test_a_job_that_its_person_left_is_not_joined_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard, backend = Listening(capsys), FakeBackend(seconds_a_step=0.2)

    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec("ward-1"))
        async with at_work(quick_stay(address, tmp_path, backend, rows=2000)):
            await heard.until("plan")
            box = outbox.find(tmp_path / "client", "ward-1")
            joined = box.joined()
            assert joined is not None
            async with remotes.connect(address, Pins(tmp_path / "client"), lambda *_: None) as remote:
                await remote.withdraw(joined.lease)  # `edge-client leave`
            box.keep_left()
            await heard.until("no_part", job="ward-1")
        runs = backend.runs
        async with at_work(quick_stay(address, tmp_path, backend)):
            await asyncio.sleep(0.5)
        assert backend.runs == runs
        (client,) = (await daemon.operator.status("ward-1")).clients
        assert client.phase == pb.PHASE_WITHDRAWN


async def test_a_coordinator_that_is_away_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard, backend, away = Listening(capsys), FakeBackend(), [True]

    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec("ward-1"))

        @asynccontextmanager
        async def connect() -> AsyncIterator[Remote]:
            if away[0]:
                raise Unreachable("no coordinator answers")
            async with remotes.connect(address, Pins(tmp_path / "client"), lambda *_: None) as remote:
                yield remote

        async with at_work(quick_stay(address, tmp_path, backend, connect)):
            while len([line for line in heard.said if line["event"] == "retry"]) < 3:
                await heard.until("retry")
                await asyncio.sleep(0.05)
                heard.said += heard.lines()
            assert backend.runs == 0
            away[0] = False
            await heard.until("done", job="ward-1")


async def test_bad_data_is_said_and_other_jobs_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard, backend = Listening(capsys), FakeBackend()

    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec("ward-1"))
        made = quick_stay(address, tmp_path, backend)
        whole = (tmp_path / "data.jsonl").read_text()
        (tmp_path / "data.jsonl").write_text('{"nothing": "of use"}\n')
        async with at_work(made):
            await heard.until("no_part", job="ward-1")
            (tmp_path / "data.jsonl").write_text(whole)
            await daemon.operator.submit(spec("ward-2"))
            await heard.until("done", job="ward-2")
        failed = [line for line in heard.said if line["event"] == "no_part"]
        assert len(failed) == 1 and "tried again in 60 s" in failed[0]["again"]


async def test_a_changed_key_ends_it(tmp_path: Path) -> None:
    async with running(tmp_path / "one") as (_, address):
        made = quick_stay(address, tmp_path, FakeBackend())
        (tmp_path / "client" / "known-coordinators.json").write_text(json.dumps({address: "0" * 64}))
        with pytest.raises(Refused, match="another key"):
            await asyncio.wait_for(made.stay(), LONG)


JOB = """
name = "{name}"
[model]
base = "{base}"
[lora]
rank = 2
target_modules = ["q_proj"]
[train]
epochs = 1
max_seq_len = 32
[round]
min_clients = 5
"""


def test_the_command_takes_part_in_what_appears_and_ends_with_sigterm(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("".join(f'{{"text": "def f{n}(x): return {n}"}}\n' for n in range(20)))
    with commands.coordinator(tmp_path / "coordinator") as address:

        def submit(name: str) -> None:
            (tmp_path / "job.toml").write_text(JOB.format(name=name, base=ROOT / "benchmarks" / "base"))
            commands.run("coordinator", "submit", tmp_path / "job.toml", "--state", tmp_path / "coordinator")

        stay = (
            sys.executable,
            "-m",
            "edge_client.cli",
            "stay",
            "--yes",
            "--server",
            address,
            "--accept",
            "ward-*",
            "--json",
        )
        options = ("--data", tmp_path / "notes.jsonl", "--state", tmp_path / "client", "--look-every", 1)
        process = subprocess.Popen(
            [*map(str, (*stay, *options))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said: list[dict[str, Any]] = []
        reading = threading.Thread(target=lambda: said.extend(map(json.loads, process.stdout or [])))
        reading.start()
        try:
            assert eventually(lambda: any(line["event"] == "staying" for line in said))
            submit("somebody-elses")
            submit("ward-notes")
            assert eventually(lambda: any(line["event"] == "done" for line in said))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=LONG)
            reading.join()
            err = process.stderr.read() if process.stderr else ""
            process.stderr.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
        assert code == 130 and "Traceback" not in err, err
        assert [line["job"] for line in said if line["event"] == "joined"] == ["ward-notes"]
        assert [line["job"] for line in said if line["event"] == "left_alone"] == ["somebody-elses"]


# ---- the service ----

ODD = ["/usr/bin/python3", "-P", "-m", "edge_client.cli", "stay", "--accept", "clinic-*", "--data"]
ODD += ['/home/jo/My "notes" $HOME 100%n \\ é', "--name", "ward 1; rm -rf ~"]


def unquoted(text: str) -> list[str]:
    """The words of a unit's ExecStart as systemd.syntax(7) has them."""
    (line,) = re.findall(r"^ExecStart=(.*)$", text, flags=re.M)
    words = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line)
    return [re.sub(r"\\(.)", r"\1", quoted or plain).replace("$$", "$").replace("%%", "%") for quoted, plain in words]


def test_the_unit_runs_the_very_command(tmp_path: Path) -> None:
    text = service.unit(ODD)
    assert unquoted(text) == ODD
    assert "100%%n" in text and "$$HOME" in text


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    file = tmp_path / service.UNIT
    file.write_text(service.unit([sys.executable, *ODD[1:]]))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    verify = ["systemd-analyze", "--user", "verify", str(file)]
    done = subprocess.run(verify, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_agent_runs_the_very_command(tmp_path: Path) -> None:
    read = plistlib.loads(service.agent(ODD, tmp_path))
    assert read["ProgramArguments"] == ODD and read["Label"] == service.LABEL and read["RunAtLoad"]
    assert read["StandardOutPath"] == read["StandardErrorPath"] == str(tmp_path / "Library/Logs/oneround-client.log")
    assert read["KeepAlive"] == {"SuccessfulExit": False} and read["Umask"] == 0o077
    made = service.launchd(tmp_path, 501)
    assert made.file == tmp_path / "Library/LaunchAgents/org.oneround.client.plist"
    assert made.start == (("launchctl", "bootstrap", "gui/501", str(made.file)),)
    assert made.stop == (("launchctl", "bootout", f"gui/501/{service.LABEL}"),)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """A user whose systemctl writes down what it is asked, and does it unless a file says not to."""
    script(
        tmp_path / "bin",
        "systemctl",
        f'echo "$@" >> {tmp_path}/asked; test ! -e {tmp_path}/broken || {{ echo "Failed to connect to bus: No medium '
        'found" >&2; exit 1; }',
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "PATH": path}


def run(home: dict[str, str], *arguments: object, code: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "edge_client.cli", *map(str, arguments)]
    done = subprocess.run(command, env=home, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd")
def test_installing_and_uninstalling(tmp_path: Path, home: dict[str, str]) -> None:
    file = tmp_path / "config" / "systemd" / "user" / service.UNIT
    (tmp_path / "notes.jsonl").write_text('{"text": "x"}\n')
    asked = tmp_path / "asked"
    with commands.coordinator(tmp_path / "coordinator") as address:
        install = ("install-service", "--yes", "--server", address, "--state", tmp_path / "client")
        install += ("--data", tmp_path / "notes.jsonl", "--backend", "torch")
        unasked = [word for word in install if word != "--yes"]
        assert "add --yes" in run(home, *unasked, "--accept", "clinic-*", code=2)[1] and not file.exists()
        out, _ = run(home, *install, "--accept", "clinic-*")
        assert "What leaves this machine for each of them, and nothing else" in out
        assert "fingerprint" in out, "the key is pinned while a person looks on"
        assert str(file) in out and "clinic-*" in out and "journalctl --user -u oneround-client" in out
        assert "loginctl enable-linger" in out
        first = file.read_text()
        expected = ["--user daemon-reload", f"--user enable {service.UNIT}", f"--user restart {service.UNIT}"]
        assert asked.read_text().splitlines() == expected
        (tmp_path / "broken").touch()
        odd = ("--accept", "clinic-*", "--accept", "ward", "--when", "always", "--no-nice", "--name", "a b")
        out, _ = run(home, *install, *odd)
        assert "No medium found" in out and f"systemctl --user enable {service.UNIT}" in out
        words = unquoted(file.read_text())
    assert words[0] == sys.executable
    arguments = words[words.index("edge_client.cli") + 1 :]
    sub = typer.main.get_command(edge_client.cli.app.app).get_command(None, arguments[0])  # type: ignore[attr-defined,arg-type]
    context = sub.make_context(arguments[0], arguments[1:])
    assert context.params["accept"] == ["clinic-*", "ward"] and context.params["server"] == address
    assert context.params["nice"] is False and context.params["name"] == "a b"
    assert [when.value for when in context.params["when"]] == ["always"]
    assert context.params["data"] == tmp_path / "notes.jsonl" and context.params["state"] == tmp_path / "client"
    run(home, *install, "--accept", "clinic-*")  # the coordinator is away now, and its key is known
    assert file.read_text() == first, "again is the same"
    assert "cannot" not in run(home, "uninstall-service")[0] and not file.exists()
    assert f"--user disable --now {service.UNIT}" in asked.read_text()
    assert "There is no" in run(home, "uninstall-service")[0]


def test_what_cannot_be_installed(tmp_path: Path, home: dict[str, str]) -> None:
    away = ("install-service", "--yes", "--server", "127.0.0.1:1", "--state", tmp_path / "client")
    (tmp_path / "notes.txt").write_text("words\n")
    _, err = run(home, *away, "--accept", "Clinic Notes", "--data", tmp_path / "notes.txt", code=2)
    assert "no job can have the name" in err
    run(home, *away, "--accept", "clinic", "--data", tmp_path / "nowhere", code=5)
    _, err = run(home, *away, "--accept", "clinic", "--data", tmp_path / "notes.txt", code=4)
    assert "no coordinator answers" in err, "a key that nobody has seen is not pinned later by itself"
    assert not list((tmp_path / "config").rglob("*"))
    assert "--accept" in run(home, *away, code=2)[1]
    nothing = {**home, "PATH": str(tmp_path / "nowhere")}
    if sys.platform.startswith("linux"):
        rest = ("--accept", "clinic", "--data", tmp_path / "notes.txt")
        assert "neither systemd nor launchd" in run(nothing, *away, *rest, code=2)[1]
