"""Running the daemon: health, metrics, reflection, draining, a second one, and the files that start it at boot."""

import asyncio
import json
import os
import plistlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import typer
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import coordinator.cli.app
import coordinator.cli.serve
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.clients import Crowd, connected
from tests.daemons import ALICE, BASE, judged, nothing, trained, written
from tests.waiting import LONG, eventually, until

DEPLOY = Path(coordinator.__file__).parent / "deploy"
JOB = f"""
name = "notes"
[model]
base = "{BASE}"
[lora]
rank = 2
target_modules = ["q_proj", "v_proj"]
[round]
min_clients = 2
[publish]
gguf = ["f16"]
"""


def serve(state: Path, *options: str) -> subprocess.Popen[str]:
    """A daemon with a job, once it listens."""
    state.mkdir()
    (state.parent / "notes.toml").write_text(JOB)
    arguments = ("serve", "--listen", "127.0.0.1:0", "--state", state, "--job", state.parent / "notes.toml", *options)
    process = commands.start("coordinator", *arguments)
    assert eventually(lambda: (state / "daemon.json").exists() or process.poll() is not None)
    return process


async def test_what_monitoring_sees(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = serve(state, "--metrics", "127.0.0.1:0", "--reflection")
    lines: list[str] = []
    assert process.stdout is not None
    reading = threading.Thread(target=lambda: lines.extend(process.stdout or []))
    reading.start()
    try:
        assert commands.run("coordinator", "health", "--state", state)[0] == "serving\n"
        with pytest.raises(AssertionError, match="another coordinator is at work"):
            commands.run("coordinator", "serve", "--listen", "127.0.0.1:0", "--state", state)
        async with connected(_address(state), tmp_path) as remote:
            reply = await remote.join_as(ALICE, pb.JoinRequest(job="notes", client_name="ward-1"))
            file, declaration = written(trained(reply), tmp_path)
            await remote.upload(reply.lease, declaration, file, nothing)
            await judged(remote, reply.lease)
        url = re.search(r"Metrics on (\S+)", "".join(lines))
        assert url
        with await asyncio.to_thread(urllib.request.urlopen, url[1]) as page:
            metrics = page.read().decode()
        assert 'oneround_contributions{job="notes",verdict="admitted"} 1.0' in metrics
        assert 'oneround_clients{job="notes",phase="contributed"} 1.0' in metrics
        assert 'oneround_job_state{job="notes",state="open"} 1.0' in metrics
        assert 'oneround_call_seconds_count{method="Upload",status="OK"} 1.0' in metrics
        assert re.search(r"oneround_uploaded_bytes_total 20\d{3}\.0", metrics)
        shown, _ = commands.run("coordinator", "show", "notes", "--state", state)
        assert "1 in" in shown and "ward-1" in shown and "admitted" in shown
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=LONG)
        reading.join()
    assert process.returncode == 0, log
    events = [dict(field.split("=", 1) for field in shlex.split(line)) for line in log.splitlines() if "event=" in line]
    for name in ("job_opened", "joined", "contribution", "judged"):
        (event,) = [event for event in events if event["event"] == name]
        assert event["job"] == "notes" and "timestamp" in event and "level" in event
        assert name == "job_opened" or event["client"]


def _address(state: Path) -> str:
    address: str = json.loads((state / "daemon.json").read_text())["address"]
    return address


def test_reflection_names_every_call(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = serve(state, "--reflection", "--insecure")
    try:
        with grpc.insecure_channel(_address(state)) as channel:
            found = ProtoReflectionDescriptorDatabase(channel)
            assert set(found.get_services()) >= {"oneround.v1.Federation", "grpc.health.v1.Health"}
            assert "oneround.v1.Admin" not in found.get_services(), "which the operator's own socket has"
            service = DescriptorPool(found).FindServiceByName("oneround.v1.Federation")
            assert {method.name for method in service.methods} >= {"Join", "Heartbeat", "OpenUpload", "Upload"}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LONG)


async def test_sigterm_lets_an_open_upload_end(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = serve(state)

    async def upload(remote: Crowd) -> pb.Receipt:
        reply = await remote.join_as(ALICE, pb.JoinRequest(job="notes"))
        file, declaration = written(trained(reply), tmp_path)
        await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(lease=reply.lease, data=file.read_bytes()[:1000])
            await until(lambda: list((state / "uploads").iterdir()))
            process.send_signal(signal.SIGTERM)
            await until(lambda: _refuses_connections(_address(state)))
            yield pb.UploadRequest(data=file.read_bytes()[1000:])

        return await remote._stub.Upload(messages())

    async with connected(_address(state), tmp_path) as remote:
        assert (await upload(remote)).size > 1000
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err
    assert commands.run("coordinator", "health", "--state", state, code=4)


def _refuses_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=LONG).close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_systemd_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "oneround-coordinator.service").read_text()
    (line,) = re.findall(r"^ExecStart=/usr/bin/env (.*)$", unit, flags=re.M)
    _parses(line)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    copy = shutil.copy(DEPLOY / "oneround-coordinator.service", tmp_path)
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", copy], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_launchd_agent() -> None:
    agent = plistlib.loads((DEPLOY / "org.oneround.coordinator.plist").read_bytes())
    shell, _, line = agent["ProgramArguments"]
    assert shell == "/bin/zsh" and agent["RunAtLoad"] and agent["ExitTimeOut"] > coordinator.cli.serve.DRAIN_SECONDS
    _parses(line.split(" exec ")[1])


def test_the_dockerfile() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for kind, words in re.findall(r"^(?:HEALTHCHECK .*)?(CMD) (\[.*\])$", text, flags=re.M):
        assert kind == "CMD"
        _parses(shlex.join(json.loads(words)))
    assert "USER oneround" in text and "STOPSIGNAL SIGTERM" in text


def _parses(line: str) -> None:
    """A command line that our parser takes."""
    name, sub, *arguments = shlex.split(line)
    assert name == "coordinator"
    command = typer.main.get_command(coordinator.cli.app.app).get_command(None, sub)  # type: ignore[attr-defined]
    assert command is not None
    command.make_context(sub, arguments, resilient_parsing=False)
