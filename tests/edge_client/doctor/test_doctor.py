"""Each check where all is well and where it is not, over a real coordinator; and the command as a person runs it."""

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from converters import adapter
from converters.adapter import Shape
from coordinator.auth import identity as identities
from coordinator.jobs import spec as job
from edge_client import backends, outbox
from edge_client.backends import BACKENDS
from edge_client.connection import identity
from edge_client.connection.target import Target
from edge_client.doctor import job_checks, machine_checks
from edge_client.doctor import run as doctor
from edge_client.doctor.finding import Case, Finding
from edge_client.preflight.memory import MemoryEstimate
from edge_client.ui.screen import Screen
from oneround.errors import Unreachable
from oneround.lan import Interface
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.daemons import BASE, SPEC, running
from tests.disks import disk

usable = [name for name in BACKENDS if backends.load(name).available() is None]
pytestmark = pytest.mark.skipif(not usable, reason="no training framework is here")
NOW = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
UP = frozenset({"up", "running"})


def rows(folder: Path, *more: str) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"question {n}", "completion": "and so on " * n}) for n in range(1, 31)]
    (folder / "notes.jsonl").write_text("\n".join([*lines, *more]))
    return folder / "notes.jsonl"


async def examined(case: Case) -> dict[str, Finding]:
    return {finding.check: finding async for finding in doctor.examine(case, Screen())}


async def with_coordinator(
    tmp_path: Path, case: Case, spec: dict[str, object] | None = SPEC, clock: Callable[[], float] = time.time
) -> dict[str, Finding]:
    """What is found with a coordinator that has a job."""
    async with running(tmp_path / "coordinator", clock) as (daemon, address):
        if spec is not None:
            await daemon.operator.submit(job.parse(spec))
        findings = await examined(replace(case, target=replace(case.target, server=case.target.server or address)))
        if spec is not None:
            status = await daemon.operator.status(str(spec["name"]))
            assert not status.clients, "examining joins nothing"
        return findings


def levels(found: dict[str, Finding]) -> dict[str, str]:
    return {name: each.level for name, each in found.items() if each.level != "ok"}


async def test_all_is_well_and_nothing_is_left_behind(tmp_path: Path) -> None:
    state = tmp_path / "client"
    found = await with_coordinator(tmp_path, Case(state, data=rows(tmp_path / "data")))
    assert levels(found) == {"certificate": "note"}, found
    assert not state.exists(), "nothing is pinned, fetched or joined"
    assert list(found) == [name for name in doctor.CHECKS if name != "local network"]
    assert "join will pin its key" in found["certificate"].says and "coordinator serve" in found["certificate"].hint
    assert "takes contributions until" in found["job"].says
    assert "10.1 MB will come from the coordinator" in found["base model"].says
    assert "target tokens" in found["data"].says
    assert "the longest row has" in found["data"].says
    assert "are free" in found["disk"].says and "are free" in found["memory"].says
    assert all("\n" not in each.says + each.hint for each in found.values())


async def test_a_folder_that_is_the_jobs_model_and_others_that_are_not(tmp_path: Path) -> None:
    case = Case(tmp_path / "client", data=rows(tmp_path / "data"), model=BASE)
    found = await with_coordinator(tmp_path, case)
    assert found["base model"].level == "ok" and "is the job's" in found["base model"].says
    assert found["memory"].level == "ok"
    (tmp_path / "empty").mkdir()
    found = await with_coordinator(tmp_path, replace(case, model=tmp_path / "empty"))
    assert (found["base model"].level, found["base model"].exit_code) == ("problem", 5)
    assert "no weights in safetensors form" in found["base model"].says
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in BASE.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "config.json").write_text("{}")
    found = await with_coordinator(tmp_path, replace(case, model=changed))
    assert "is not the job's base model: config.json" in found["base model"].says
    assert "leave --model out" in found["base model"].hint
    assert "memory" not in found and found["data"].level == "ok", "what can be looked at is"


async def test_rows_that_are_cut_or_bad(tmp_path: Path) -> None:
    short = {**SPEC, "train": {"max_seq_len": 16}}
    case = Case(tmp_path / "client", data=rows(tmp_path / "data"))
    found = await with_coordinator(tmp_path, case, short)
    assert found["data"].level == "note" and "are cut at 16 tokens" in found["data"].says
    case = replace(case, data=rows(tmp_path / "bad", '{"txet": "typo"}'))
    found = await examined(replace(case, target=Target("127.0.0.1:1")))
    assert (found["data"].level, found["data"].exit_code) == ("problem", 5)
    assert "notes.jsonl:31" in found["data"].says and "--skip-bad-rows" in found["data"].hint
    found = await examined(replace(case, target=Target("127.0.0.1:1"), skip_bad_rows=True))
    assert found["data"].level == "note" and "1 bad rows are skipped" in found["data"].says


async def test_a_coordinator_that_does_not_answer(tmp_path: Path) -> None:
    case = Case(tmp_path / "client", target=Target("127.0.0.1:1"), data=tmp_path / "none", model=tmp_path)
    found = await examined(case)
    assert (found["coordinator"].level, found["coordinator"].exit_code) == ("problem", 4)
    assert "coordinator serve" in found["coordinator"].hint
    assert found["base model"].level == "problem" and found["data"].level == "problem"
    assert found["disk"].level == "ok" and "are free" in found["disk"].says
    assert not {"certificate", "clock", "job", "memory"} & found.keys()
    assert "which, a job will say" in (await examined(replace(case, model=BASE)))["base model"].says


async def test_a_key_that_is_pinned_and_one_that_has_changed(tmp_path: Path) -> None:
    state = tmp_path / "client"
    state.mkdir()

    async with running(tmp_path / "coordinator") as (daemon, address):
        await daemon.operator.submit(job.parse(SPEC))
        case = Case(state, target=Target(address), data=rows(tmp_path / "data"))
        identity.Pins(state).pin(address, identities.load_or_create(tmp_path / "coordinator").fingerprint)
        pinned = await examined(case)
        (state / "known-coordinators.json").write_text(json.dumps({address: "ab" * 32}))
        changed = await examined(Case(state, target=Target(address)))
    assert pinned["certificate"].level == "ok" and "the one that is pinned" in pinned["certificate"].says
    assert (changed["certificate"].level, changed["certificate"].exit_code) == ("problem", 3)
    assert "another key than the last time" in changed["certificate"].says
    assert "edge-client trust 127.0.0.1:" in changed["certificate"].hint
    assert "job" not in changed, "nobody is asked for a job who may be somebody else"


def pem(begins: datetime.datetime, ends: datetime.datetime) -> bytes:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    signed = made.serial_number(1).not_valid_before(begins).not_valid_after(ends).sign(key, hashes.SHA256())
    return signed.public_bytes(Encoding.PEM)


def test_the_dates_of_a_certificate() -> None:
    day = datetime.timedelta(days=1)
    assert job_checks.validity(pem(NOW - day, NOW + 365 * day), False, NOW).level == "ok"
    soon = job_checks.validity(pem(NOW - day, NOW + 7 * day), False, NOW)
    assert soon.level == "note" and "2026-11-28" in soon.says and "same key" in soon.hint
    with pytest.raises(Unreachable, match="ended on 2026-11-20"):
        job_checks.validity(pem(NOW - 9 * day, NOW - day), False, NOW)
    with pytest.raises(Unreachable, match="does not hold before 2026-11-22") as caught:
        job_checks.validity(pem(NOW + day, NOW + 9 * day), False, NOW)
    assert "set this machine's clock" in caught.value.hint


@pytest.mark.parametrize(("ahead", "level", "says"), [(-300.0, "note", "0:05:00 behind"), (7200.0, "problem", "ahead")])
async def test_a_clock_that_is_wrong(tmp_path: Path, ahead: float, level: str, says: str) -> None:
    case = Case(tmp_path / "client", data=rows(tmp_path / "data"))
    found = await with_coordinator(tmp_path, case, clock=lambda: time.time() - ahead)
    assert found["clock"].level == level and says in found["clock"].says and found["clock"].hint
    assert found["clock"].exit_code == (2 if level == "problem" else 0)


async def test_jobs_that_are_not_there(tmp_path: Path) -> None:
    case = Case(tmp_path / "client", data=rows(tmp_path / "data"))
    found = await with_coordinator(tmp_path, case, None)
    assert (found["job"].level, found["job"].exit_code) == ("problem", 3) and "no job is open" in found["job"].says
    found = await with_coordinator(tmp_path, replace(case, job_name="other"))
    assert "no job 'other'" in found["job"].says and found["job"].hint == "--job with one of: notes"
    assert not {"base model", "memory"} & found.keys()


async def test_a_job_that_takes_no_more(tmp_path: Path) -> None:
    async with running(tmp_path / "coordinator") as (daemon, address):
        await daemon.operator.submit(job.parse(SPEC))
        await daemon.operator.cancel("notes")
        case = Case(tmp_path / "client", target=Target(address), job_name="notes", data=rows(tmp_path / "data"))
        found = await examined(case)
    assert found["job"].exit_code == 3 and "takes no more contributions" in found["job"].says


async def test_what_is_trained_needs_no_data(tmp_path: Path) -> None:
    async with running(tmp_path / "coordinator") as (daemon, address):
        await daemon.operator.submit(job.parse(SPEC))
        announced = await daemon.participation.describe("notes")
        box = outbox.outbox(tmp_path, announced)
        box.keep_joined(address, pb.JoinReply(lease="x", job=announced))
        box.keep_trained(adapter.initial({"x": Shape(3, 2)}, 1, 0), "bfloat16", pb.Declaration(num_examples=3))
        case = Case(tmp_path, target=Target(address), data=tmp_path / "none")
        found = await examined(case)
    assert "trained here already" in found["job"].says and "data" not in found
    assert found["disk"].level == "ok"


async def test_a_disk_without_room(tmp_path: Path) -> None:
    with disk(tmp_path / "client", 16) as state:
        found = await with_coordinator(tmp_path, Case(state, data=rows(tmp_path / "data")))
        assert (found["disk"].level, found["disk"].exit_code) == ("problem", 6)
        assert f"not enough room on the disk of {state}" in found["disk"].says and "free " in found["disk"].hint
        found = await examined(Case(state, target=Target("127.0.0.1:1")))
        assert found["disk"].level == "note"


def test_memory_that_is_short() -> None:
    spec = pb.Job(spec=pb.JobSpec(train=pb.TrainSpec(batch_size=8, max_seq_len=512)))
    short = job_checks.outlook(MemoryEstimate(3 * 10**9, 10**9), spec)
    assert short.level == "note" and "3.0 GB, and 1.0 GB are free" in short.says and "batch_size (8)" in short.hint
    assert job_checks.outlook(MemoryEstimate(10**9, 3 * 10**9), spec).level == "ok"
    assert "the device's own" in job_checks.outlook(MemoryEstimate(10**9, None), spec).says
    assert "cannot be told" in job_checks.outlook(None, spec).says


async def test_a_backend_that_is_none(tmp_path: Path) -> None:
    case = Case(tmp_path, target=Target("127.0.0.1:1"), backend_name="jax", data=rows(tmp_path / "data"))
    found = await examined(case)
    assert (found["backend"].level, found["backend"].exit_code) == ("problem", 2) and "--backend" in found[
        "backend"
    ].hint
    assert found["data"].level == "ok"


def test_packages_that_do_not_fit() -> None:
    wanted = ["numpy>=2.0", 'torch>=2.6; extra == "torch"', 'mlx>=0.29; extra == "mlx"', "absent>=1"]
    here = {"numpy": "1.26.4", "torch": "2.13.0+cpu", "absent": "1.0"}.get
    assert machine_checks.unmet(wanted, "torch", here) == ["numpy 1.26.4 is here, >=2.0 is needed"]
    assert machine_checks.unmet(wanted, "mlx", {"numpy": "2.1", "absent": "1.5"}.get) == ["mlx is not installed"]


def test_networks_that_count_and_those_that_do_not() -> None:
    loopback, wifi = Interface("lo", UP, ("127.0.0.1",)), Interface("wlan0", UP, ("192.0.2.7", "fe80::1%wlan0"))
    docker, down = Interface("docker0", UP, ("172.17.0.1",)), Interface("eth1", frozenset(), ())
    found = machine_checks.networks([loopback, wifi, docker, down])
    assert found.level == "ok" and "through wlan0 (192.0.2.7); not through lo (this machine alone)" in found.says
    assert "docker0 (for containers" in found.says and "eth1 (down)" in found.says
    alone = machine_checks.networks([loopback, docker])
    assert alone.level == "note" and "on no local network" in alone.says and "--server" in alone.hint


@pytest.mark.parametrize(
    ("system", "release", "unreached", "told"),
    [
        ("darwin", "15.1", "No route to host", True),
        ("darwin", "26.0", "nobody makes itself known", True),
        ("darwin", "15.1", "", False),
        ("darwin", "14.7", "No route to host", False),
        ("linux", "", "No route to host", False),
    ],
)
def test_the_local_network_of_macos(system: str, release: str, unreached: str, told: bool) -> None:
    found = machine_checks.local_network_guard(system, release, unreached)
    assert (found is not None) == told
    if found is not None:
        assert found.level == "note" and "Privacy & Security > Local Network" in found.hint


async def test_this_machine_by_itself(tmp_path: Path) -> None:
    found = await examined(Case(tmp_path, target=Target("127.0.0.1:1")))
    assert found["python"].level == "ok" and "Python 3." in found["python"].says
    assert found["packages"].level == "ok" and "oneround" in found["packages"].says
    assert found["backend"].says.split()[0] in usable


def test_the_command(tmp_path: Path) -> None:
    out, err = commands.run("edge-client", "doctor", "--server", "127.0.0.1:1", "--state", tmp_path / "s", code=4)
    lines = out.splitlines()
    assert "Error" not in err and lines[-1].endswith("stop this machine from taking part.")
    assert any(line.startswith("problem  coordinator") for line in lines)
    arguments = ("doctor", "--server", "127.0.0.1:1", "--state", tmp_path / "s", "--json")
    out, _ = commands.run("edge-client", *arguments, code=4)
    said = [json.loads(line) for line in out.splitlines()]
    assert all(each.keys() == {"check", "level", "says", "hint"} for each in said)
    assert all(bool(each["hint"]) == (each["level"] != "ok") for each in said)
