"""What this machine says of itself, and what can be asked of it: readings, priority, staying awake.

Signals, and where they come from:
    battery   Linux: /sys/class/power_supply, where psutil takes a mouse's battery for the machine's; else psutil
    heat      Linux: psutil's sensors against their own critical trip; macOS: the thermal pressure level, or a CPU that
              pmset says is slowed down
    memory    psutil; macOS also the kernel's own pressure level
    idle      macOS: IOHIDSystem's HIDIdleTime; Linux: logind's idle hint, which desktops set and terminals give by
              themselves; without logind the last key typed in any terminal, if there is no desktop
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from edge_client.pausing.policy import Heat, Readings
from oneround.errors import UsageError

_MAC = sys.platform == "darwin"
_ANSWER_SECONDS = 5.0
_NICE = 10
_HOT, _COOL = 5.0, 15.0  # °C below a sensor's critical trip
_SLOWED = 80  # percent of a Mac's CPU speed

SUPPLIES = Path("/sys/class/power_supply")
DEVICES = Path("/dev")


def read(*, idle: bool) -> Readings:
    """How things stand; whether somebody is at the machine only where it is asked for. Takes some milliseconds."""
    on_battery, battery = power()
    memory = psutil.virtual_memory()
    return Readings(
        battery=battery,
        on_battery=on_battery,
        heat=_heat(),
        memory=100.0 * memory.available / memory.total,
        memory_short=_MAC and _output("sysctl", "-n", "kern.memorystatus_vm_pressure_level").strip() == "4",
        idle=idle_seconds() if idle else None,
    )


def require_idle() -> None:
    """Raises UsageError when this machine cannot tell whether somebody uses it."""
    if idle_seconds() is None:
        raise UsageError(
            "this machine does not say whether somebody uses it: "
            + ("ioreg gives no idle time" if _MAC else "logind does not answer, and terminals do not tell it all"),
            hint="leave out --when idle",
        )


def power(supplies: Path = SUPPLIES) -> tuple[bool, float | None]:
    """Whether the machine runs on its battery, and what is left in percent; of several, of all together."""
    if not sys.platform.startswith("linux"):
        battery = psutil.sensors_battery()
        return (battery is not None and not battery.power_plugged), (battery.percent if battery else None)
    levels, draining, online = [], False, False
    for supply in sorted(supplies.glob("*")):
        kind, scope = _line(supply / "type"), _line(supply / "scope")
        if kind == "Battery" and scope != "Device":  # `Device`: a mouse's or a keyboard's
            with suppress(ValueError):
                levels.append(float(_line(supply / "capacity")))
            draining = draining or _line(supply / "status") == "Discharging"
        elif kind in ("Mains", "USB") and scope != "Device":
            online = online or _line(supply / "online") == "1"
    return bool(levels) and draining and not online, (sum(levels) / len(levels) if levels else None)


def idle_seconds() -> float | None:
    """Seconds since somebody last used this machine; None: it cannot be told."""
    if _MAC:
        return hid_idle(_output("ioreg", "-r", "-c", "IOHIDSystem", "-d", "1"))
    manager = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
    match = re.match(
        r"b (true|false)\nt (\d+)", _output("busctl", "get-property", *manager, "IdleHint", "IdleSinceHint")
    )
    if match:
        return max(time.time() - int(match[2]) / 1e6, 0.0) if match[1] == "true" else 0.0
    on_windows = "microsoft" in platform.release().lower()  # WSL sees its own terminals, not the person's
    if on_windows or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return None
    return _since_last_key()


def _since_last_key(devices: Path = DEVICES) -> float | None:
    """A terminal's time of access is when something was last typed into it, as `w` shows; None: there is none."""
    names = {*(str(path.relative_to(devices)) for path in devices.glob("pts/[0-9]*"))}
    names |= {user.terminal for user in psutil.users() if user.terminal}
    typed = []
    for name in names:
        with suppress(OSError):
            typed.append((devices / name).stat().st_atime)
    return max(time.time() - max(typed), 0.0) if typed else None


def hid_idle(listing: str) -> float | None:
    """Seconds of idleness, from what ioreg says of IOHIDSystem."""
    match = re.search(r'"HIDIdleTime"\s*=\s*(\d+)', listing)
    return int(match[1]) / 1e9 if match else None


def _heat() -> Heat:
    if _MAC:
        pressure = _output("notifyutil", "-g", "com.apple.system.thermalpressurelevel")
        return heat_of_a_mac(pressure, _output("pmset", "-g", "therm"))
    groups = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return heat((sensor.current, sensor.critical) for group in groups.values() for sensor in group)


def heat(sensors: Iterable[tuple[float | None, float | None]]) -> Heat:
    """The hottest of sensors, each with what it shows and what it calls critical itself, in °C."""
    left = [
        critical - current
        for current, critical in sensors
        if current and critical and 50.0 <= critical <= 150.0  # others are made up by firmware
    ]
    nearest = min(left, default=_COOL)
    return Heat.HOT if nearest < _HOT else Heat.WARM if nearest < _COOL else Heat.COOL


def heat_of_a_mac(pressure: str, therm: str) -> Heat:
    """From the thermal pressure level (0 nominal, 1 moderate, then heavy and worse), and from the CPU's speed as pmset
    tells it."""
    level = re.search(r"\s(\d+)\s*$", pressure)
    slowed = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", therm)
    if (level and int(level[1]) >= 2) or (slowed and int(slowed[1]) < _SLOWED):
        return Heat.HOT
    return Heat.WARM if level and int(level[1]) == 1 else Heat.COOL


def lower_priority() -> None:
    """Let everything else go first, for the CPU and, on Linux, for disks. For threads that start from here on, too."""
    process = psutil.Process()
    with suppress(psutil.Error, OSError):
        process.nice(max(int(process.nice()), _NICE))
    if sys.platform.startswith("linux"):
        with suppress(psutil.Error, OSError):
            process.ionice(psutil.IOPRIO_CLASS_BE, 7)


def keep_awake() -> Callable[[], None]:
    """Keep the machine from falling asleep, not its screen; what is given ends that. It ends with this process too,
    however that ends. Where a machine knows of no way, nothing happens."""
    command = awake_command(_MAC, os.getpid())
    if shutil.which(command[0]) is None:
        return lambda: None
    quiet = subprocess.DEVNULL  # in a session of its own: no terminal to ask for a password on, no Ctrl-C
    holder = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)

    def release() -> None:
        with suppress(OSError):
            os.killpg(holder.pid, signal.SIGTERM)
        holder.wait()

    return release


def awake_command(mac: bool, pid: int) -> list[str]:
    """The program that keeps a machine, not its screen, from sleeping for as long as a process lives."""
    if mac:
        return ["caffeinate", "-is", "-w", str(pid)]
    why = ("--what=sleep", "--who=edge-client", "--why=training", "--mode=block")
    return ["systemd-inhibit", *why, "tail", f"--pid={pid}", "-f", "/dev/null"]


def _output(*command: str) -> str:
    """What a program of the system prints; empty if it is not there, fails or does not answer."""
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return child.stdout


def _line(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
