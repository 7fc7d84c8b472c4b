"""A polite guest: when training pauses, that it goes on as if it had not, and that it can be ended while it waits."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from converters import adapter, tensors
from coordinator.jobs import spec as job
from edge_client import backends, outbox, session
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.pausing import sensors as machine
from edge_client.pausing.controller import PauseController
from edge_client.pausing.policy import IDLE_SECONDS, Heat, Pause, PausePolicy, Readings, decide, why_pause
from edge_client.ui.events import Event
from edge_client.ui.screen import Screen
from oneround.errors import Refused
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.commands import script
from tests.daemons import SPEC, running
from tests.waiting import LONG, eventually, until

ROOT = Path(__file__).parents[3]
FINE = Readings(battery=80.0, idle=9999.0, memory=50.0)
ON_BATTERY = replace(FINE, on_battery=True)

TABLE = [
    (FINE, PausePolicy(), None),
    (Readings(), PausePolicy(), None),  # a desktop that tells nothing
    (ON_BATTERY, PausePolicy(), None),
    (ON_BATTERY, PausePolicy(plugged_in=True), "unplugged"),
    (Readings(), PausePolicy(plugged_in=True), None),
    (replace(ON_BATTERY, battery=29.0), PausePolicy(), "battery"),
    (replace(ON_BATTERY, battery=30.0), PausePolicy(), None),
    (replace(FINE, battery=3.0), PausePolicy(), None),  # charging
    (replace(ON_BATTERY, battery=3.0), PausePolicy(min_battery=0), None),
    (replace(ON_BATTERY, battery=59.0), PausePolicy(min_battery=60), "battery"),
    (replace(FINE, idle=0.0), PausePolicy(), None),
    (replace(FINE, idle=0.0), PausePolicy(idle=True), "in_use"),
    (replace(FINE, idle=IDLE_SECONDS - 1), PausePolicy(idle=True), "in_use"),
    (replace(FINE, idle=IDLE_SECONDS), PausePolicy(idle=True), None),
    (replace(FINE, idle=None), PausePolicy(idle=True), "in_use"),  # not known is not idle
    (replace(ON_BATTERY, idle=9999.0), PausePolicy(idle=True, plugged_in=True), "unplugged"),
    (replace(FINE, idle=1.0), PausePolicy(idle=True, plugged_in=True), "in_use"),
    (replace(FINE, heat=Heat.WARM), PausePolicy(), None),
    (replace(FINE, heat=Heat.HOT), PausePolicy(), "heat"),
    (replace(FINE, memory=4.9), PausePolicy(), "memory"),
    (replace(FINE, memory=5.0), PausePolicy(), None),
    (replace(FINE, memory=0.1, memory_short=True), PausePolicy(min_memory=0), None),
    (replace(FINE, memory_short=True), PausePolicy(), "memory"),
]


@pytest.mark.parametrize(("readings", "manners", "kind"), TABLE)
def test_when_training_pauses(readings: Readings, manners: PausePolicy, kind: str | None) -> None:
    reason = why_pause(readings, manners)
    assert (reason.kind if reason else None) == kind


GOING_ON = [  # a reading that would not begin a pause, the pause's kind, whether it ends it
    (replace(ON_BATTERY, battery=34.0), "battery", False),
    (replace(ON_BATTERY, battery=35.0), "battery", True),
    (replace(FINE, battery=31.0), "battery", True),  # plugged in
    (replace(FINE, heat=Heat.WARM), "heat", False),
    (replace(FINE, heat=Heat.COOL), "heat", True),
    (replace(FINE, memory=7.9), "memory", False),
    (replace(FINE, memory=8.0), "memory", True),
    (replace(FINE, memory=7.9), "battery", True),
]


@pytest.mark.parametrize(("readings", "kind", "ends"), GOING_ON)
def test_it_takes_more_to_go_on_than_to_pause(readings: Readings, kind: str, ends: bool) -> None:
    assert why_pause(readings, PausePolicy()) is None
    assert (why_pause(readings, PausePolicy(), paused_for=kind) is None) == ends


def test_a_pause_ends_when_there_was_no_reason_for_a_while() -> None:
    manners = PausePolicy(plugged_in=True, settle=30.0)
    pause: Pause | None = None
    seen = []
    plug = [
        (0, True),
        (10, False),
        (15, True),
        (20, False),
        (44, True),
        (49, True),
        (50, False),
        (79, True),
        (80, True),
    ]
    for now, plugged in plug:
        pause = decide(replace(FINE, on_battery=not plugged), manners, pause, float(now))
        seen.append(pause is not None)
    assert seen == [False, True, True, True, True, True, True, True, False]


def test_reasons_read_well() -> None:
    kinds = set()
    for readings, manners, _ in TABLE:
        if reason := why_pause(readings, manners):
            kinds.add(reason.kind)
            assert reason.until.startswith("when ") and not reason.why.endswith(".")
    assert kinds == {"unplugged", "battery", "in_use", "heat", "memory"}


# ---- what the machine says ----


def supply(folder: Path, **lines: str) -> None:
    folder.mkdir(parents=True)
    for name, line in lines.items():
        (folder / name).write_text(f"{line}\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's files")
def test_power_on_linux(tmp_path: Path) -> None:
    assert machine.power(tmp_path / "none") == (False, None)
    mouse = {"type": "Battery", "scope": "Device", "capacity": "5", "status": "Discharging"}
    supply(tmp_path / "desktop" / "hidpp_battery_0", **mouse)
    assert machine.power(tmp_path / "desktop") == (False, None), "a mouse's battery is not the machine's"
    laptop = tmp_path / "laptop"
    supply(laptop / "BAT0", type="Battery", capacity="20", status="Discharging")
    supply(laptop / "BAT1", type="Battery", capacity="60", status="Not charging")
    supply(laptop / "ADP1", type="Mains", online="0")
    assert machine.power(laptop) == (True, 40.0)
    (laptop / "ADP1" / "online").write_text("1\n")
    assert machine.power(laptop) == (False, 40.0)
    (laptop / "ADP1" / "online").write_text("0\n")
    for battery in ("BAT0", "BAT1"):
        (laptop / battery / "status").write_text("Full\n")
    assert machine.power(laptop) == (False, 40.0)


@pytest.mark.parametrize(
    ("sensors", "expected"),
    [
        ([], Heat.COOL),
        ([(97.0, None), (60.0, 0.0), (40.0, 10000.0)], Heat.COOL),  # no trip, or none that can be meant
        ([(50.0, 100.0), (40.0, 85.0)], Heat.COOL),
        ([(50.0, 100.0), (72.0, 85.0)], Heat.WARM),
        ([(96.0, 100.0), (40.0, 85.0)], Heat.HOT),
    ],
)
def test_heat_by_the_sensors_own_limits(sensors: list[tuple[float, float | None]], expected: Heat) -> None:
    assert machine.heat(sensors) == expected


NOTHING_RECORDED = (
    "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
)
SLOWED = "2026-11-21 10:00:00 +0100 CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= {}\n"


@pytest.mark.parametrize(
    ("pressure", "therm", "expected"),
    [
        ("", "", Heat.COOL),
        ("com.apple.system.thermalpressurelevel 0\n", NOTHING_RECORDED, Heat.COOL),
        ("com.apple.system.thermalpressurelevel 1\n", NOTHING_RECORDED, Heat.WARM),
        ("com.apple.system.thermalpressurelevel 2\n", NOTHING_RECORDED, Heat.HOT),
        ("com.apple.system.thermalpressurelevel 0\n", SLOWED.format(100), Heat.COOL),
        ("com.apple.system.thermalpressurelevel 0\n", SLOWED.format(62), Heat.HOT),
    ],
)
def test_heat_of_a_mac(pressure: str, therm: str, expected: Heat) -> None:
    assert machine.heat_of_a_mac(pressure, therm) == expected


def test_idleness_of_a_mac() -> None:
    said = """+-o IOHIDSystem  <class IOHIDSystem, id 0x1000002fb, registered, matched, active, busy 0 (0 ms)>
    {
      "HIDParameters" = {"HIDClickTime"=500000000,"HIDIdleTimeDelta"=7}
      "HIDIdleTime" = 301250000000
    }
"""
    assert machine.hid_idle(said) == 301.25 and machine.hid_idle("") is None


def test_the_screen_is_let_sleep() -> None:
    assert machine.awake_command(True, 42) == ["caffeinate", "-is", "-w", "42"]
    assert "--what=sleep" in machine.awake_command(False, 42) and "--pid=42" in machine.awake_command(False, 42)


def test_this_machine_can_be_read() -> None:
    found = machine.read(idle=True)
    assert 0 < found.memory <= 100 and (found.idle is None or found.idle >= 0)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        machine.read(idle=False)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1, "where nothing else takes the time"


def test_a_lower_priority_is_had_by_threads_that_start_later() -> None:
    program = """
import os, threading
from edge_client.pausing import sensors as machine
machine.lower_priority(); machine.lower_priority()
found = []
thread = threading.Thread(target=lambda: found.append(os.nice(0)))
thread.start(); thread.join()
print(os.nice(0), found[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = max(os.nice(0), 10)
    assert done.stdout.split() == [str(expected)] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd")
def test_the_machine_is_kept_awake_for_as_long_as_it_is_asked_to(tmp_path: Path) -> None:
    """By a stand-in that does what systemd-inhibit does to its command; asked for, let go of, and left to kill -9."""
    script(tmp_path / "bin", "systemd-inhibit", f'echo "$@" >> {tmp_path}/asked; shift 4; "$@" & wait')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    program = """
import sys, time
from edge_client.pausing import sensors as machine
release = machine.keep_awake()
time.sleep(0.5)
if sys.argv[1] == "release":
    release()
    print("released", flush=True)
time.sleep(60)
"""

    def holders(pid: int) -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if f"--pid={pid}" in (p.info["cmdline"] or [])]

    for ending in ("release", "kill"):
        command = [sys.executable, "-c", program, ending]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PATH": path}) as process:
            assert process.stdout is not None
            if ending == "release":
                assert process.stdout.readline() == "released\n"
            else:
                assert eventually(lambda: holders(process.pid))
                process.kill()
                process.wait()
            assert eventually(lambda: not holders(process.pid))
            process.kill()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and all("--what=sleep" in line and "--mode=block" in line for line in asked)


# ---- training that pauses ----


class Laptop:
    """A machine whose plug a test pulls: `read` and `keep_awake` as sensors.py has them."""

    def __init__(self) -> None:
        self.readings = FINE
        self.awake = 0
        self.reads = 0

    def read(self) -> Readings:
        self.reads += 1
        return self.readings

    def keep_awake(self) -> Callable[[], None]:
        self.awake += 1

        def release() -> None:
            self.awake -= 1

        return release

    def pausing(self) -> PauseController:
        asked = PausePolicy(plugged_in=True, settle=0.0)
        return PauseController(asked, read=self.read, keep_awake=self.keep_awake, look_seconds=0.05)


def participant(folder: Path, pausing: PauseController, rows: int = 40) -> session.Participant:
    folder.mkdir(exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(f'{{"text": "def f{n}(x): return x + {n}"}}\n' for n in range(rows)))
    return session.Participant(
        state=folder, name="alice", data=data, backend=backends.choose(), pausing=pausing, save_every=3600
    )


class Timed(Screen):
    """Prints as `--json` does, and knows when it last said what, in seconds."""

    def __init__(self) -> None:
        super().__init__(as_json=True)
        self.at: dict[str, float] = {}

    def say(self, event: Event) -> None:
        self.at[event.event] = time.monotonic()
        super().say(event)


async def take_part(address: str, who: session.Participant, screen: Screen | None = None) -> pb.Receipt:
    async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
        return await session.take_part(remote, "notes", who, screen or Screen(as_json=True))


def spec(**train: object) -> pb.JobSpec:
    return job.parse({**SPEC, "train": {"batch_size": 4, "max_seq_len": 32, "epochs": 2, **train}})


async def test_a_run_that_pauses_gives_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laptop, screen = Laptop(), Timed()
    laptop.readings = ON_BATTERY  # waits before it begins, too

    paused, whole = (
        participant(tmp_path / "paused", laptop.pausing()),
        participant(tmp_path / "whole", PauseController()),
    )
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec())
        taking = asyncio.create_task(take_part(address, paused, screen))

        async def stands_still() -> bool:
            (client,) = (await daemon.operator.status("notes")).clients
            return client.phase == pb.PHASE_TRAINING and client.step >= 1 and client.tokens_per_second == 0

        await until(lambda: laptop.reads > 1)
        assert laptop.awake == 0
        laptop.readings = FINE
        await until(lambda: list((tmp_path / "paused").rglob("initial.safetensors")))
        laptop.readings = ON_BATTERY
        await until(lambda: list((tmp_path / "paused").rglob("training.safetensors")))
        assert laptop.awake == 0
        await until(stands_still)  # heartbeats go on
        (client,) = (await daemon.operator.status("notes")).clients
        before = client.step
        await asyncio.sleep(3.0)  # which is not training
        (client,) = (await daemon.operator.status("notes")).clients
        assert client.step == before
        laptop.readings = FINE
        await taking
        assert laptop.awake == 0
        await take_part(address, whole)
    one, other = (adapter.read(outbox.find(who.state, "notes").adapter) for who in (paused, whole))
    for name, factors in one.modules.items():
        assert np.array_equal(factors.a, other.modules[name].a)
        assert np.array_equal(factors.b, other.modules[name].b)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    events = [line["event"] for line in said]
    assert events.count("paused") == events.count("unpaused") == 2
    assert events.index("paused") < events.index("plan"), "nothing is begun on battery"
    paused = next(line for line in said if line["event"] == "paused")
    assert paused["reason"] == "unplugged" and "battery" in paused["why"] and "plugged in" in paused["until"]
    waited = [line["seconds"] for line in said if line["event"] == "unpaused"][-1]
    assert waited > 3.0
    seconds = said[events.index("trained")]["seconds"]
    assert seconds < screen.at["trained"] - screen.at["plan"] - waited + 0.5, "a pause is not training"


async def test_a_coordinators_stop_ends_a_pause(tmp_path: Path) -> None:
    laptop = Laptop()
    laptop.readings = ON_BATTERY

    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec())
        taking = asyncio.create_task(take_part(address, participant(tmp_path / "client", laptop.pausing())))
        async for status in daemon.statuses.watch("notes"):
            if status.joined:
                break
        await daemon.operator.close("notes")
        with pytest.raises(Refused, match="stopped this job"):
            await asyncio.wait_for(taking, LONG)


JOB = """
name = "patient"
[model]
base = "{base}"
[lora]
rank = 4
[train]
epochs = 200
batch_size = 4
max_seq_len = 64
[round]
min_clients = 5
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in speaks as logind's busctl")
def test_ctrl_c_while_it_waits_for_an_idle_machine(tmp_path: Path) -> None:
    """The command itself, on a machine whose logind says whether somebody is there."""
    logind = tmp_path / "logind"
    script(tmp_path / "bin", "busctl", f"cat {logind}")
    idle, busy = "b true\nt 1000000\n", f"b false\nt {int(time.time() * 1e6)}\n"
    logind.write_text(idle)
    (tmp_path / "notes.jsonl").write_text("".join(f'{{"text": "def f{n}(x): return {n}"}}\n' for n in range(90)))
    (tmp_path / "job.toml").write_text(JOB.format(base=ROOT / "benchmarks" / "base"))
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with commands.coordinator(tmp_path / "coordinator") as address:
        commands.run("coordinator", "submit", tmp_path / "job.toml", "--state", tmp_path / "coordinator")
        join = (
            sys.executable,
            "-m",
            "edge_client.cli",
            "join",
            "--yes",
            "--server",
            address,
            "--data",
            tmp_path / "notes.jsonl",
        )
        options = ("--when", "idle", "--nice", "--json", "--save-every", 3600, "--state", tmp_path / "client")
        process = subprocess.Popen(
            [*map(str, (*join, *options))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(json.loads(line))
            if said[-1]["event"] == "progress" and said[-1]["what"] == "training":
                (tmp_path / "new").write_text(busy)
                (tmp_path / "new").replace(logind)  # so that nobody reads half of it
            if said[-1]["event"] == "paused":
                break
        assert said[-1]["reason"] == "in_use"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LONG)
        assert process.returncode == 130 and "Traceback" not in err, err
        assert "unpaused" not in out
        (kept,) = (tmp_path / "client").rglob("training.safetensors")
        assert len(tensors.read(kept)[0]["losses"]) >= 1, "what was trained before the pause is there to go on from"


def test_a_machine_that_cannot_tell_whether_it_is_idle_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "WAYLAND_DISPLAY": "wayland-0"}
    command = [
        sys.executable,
        "-m",
        "edge_client.cli",
        "join",
        "--yes",
        "--when",
        "idle",
        "--state",
        str(tmp_path / "client"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "does not say whether somebody uses it" in done.stderr
    assert "leave out --when idle" in done.stderr
    assert shutil.which("busctl", path=str(tmp_path)) is None
