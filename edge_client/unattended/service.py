"""A staying client as a service of its user's: a systemd user unit, or a launchd agent."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from oneround import files
from oneround.errors import NotEnough, UsageError

UNIT = "oneround-client.service"
LABEL = "org.oneround.client"
_STOP_SECONDS = 120  # for one step of training, and to keep how far it is
_AGAIN_SECONDS = 60  # after a failure
_ANSWER_SECONDS = _STOP_SECONDS + 30.0

Command = tuple[str, ...]


@dataclass(frozen=True)
class Service:
    """A file, and the commands that have the system read it. `clear` may fail where nothing runs."""

    file: Path
    content: Callable[[Sequence[str]], bytes]  # of the file, for the command line that the service runs
    clear: tuple[Command, ...]
    start: tuple[Command, ...]
    stop: tuple[Command, ...]  # before the file is removed
    forget: tuple[Command, ...]  # after it
    log: str  # the command that shows what the service reports
    needs_login: bool  # it runs only while its user is logged in, unless the system is told otherwise


def of_this_user() -> Service:
    """The service of whoever runs this.

    Raises:
        UsageError: this machine has neither systemd nor launchd.
    """
    if sys.platform == "darwin":
        return launchd(Path.home(), os.getuid())
    if shutil.which("systemctl") is None:
        raise UsageError(
            "this machine has neither systemd nor launchd to run a service",
            hint="start `edge-client stay …` with the program that starts services on this machine",
        )
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return systemd(Path(config) if Path(config).is_absolute() else Path.home() / ".config")


def systemd(config: Path) -> Service:
    """A user unit in the user's configuration folder."""
    systemctl = ("systemctl", "--user")
    return Service(
        file=config / "systemd" / "user" / UNIT,
        content=lambda command: unit(command).encode(),
        clear=(),
        # Restarted, so that what was installed anew holds; `enable --now` would leave the old one running.
        start=((*systemctl, "daemon-reload"), (*systemctl, "enable", UNIT), (*systemctl, "restart", UNIT)),
        stop=((*systemctl, "disable", "--now", UNIT),),
        forget=((*systemctl, "daemon-reload"),),
        log=f"journalctl --user -u {UNIT.removesuffix('.service')} -f",
        needs_login=True,
    )


def launchd(home: Path, uid: int) -> Service:
    """An agent in the user's library."""
    file = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    bootout = ("launchctl", "bootout", f"gui/{uid}/{LABEL}")
    return Service(
        file=file,
        content=lambda command: agent(command, home),
        clear=(bootout,),
        start=(("launchctl", "bootstrap", f"gui/{uid}", str(file)),),
        stop=(bootout,),
        forget=(),
        log=f"tail -f {shlex.quote(str(log_file(home)))}",
        needs_login=False,
    )


def log_file(home: Path) -> Path:
    """Where launchd puts the output of the agent."""
    return home / "Library" / "Logs" / "oneround-client.log"


def unit(command: Sequence[str]) -> str:
    """The systemd user unit that runs a command line."""
    return f"""\
# Written by `edge-client install-service`, which replaces it; `edge-client uninstall-service` removes it.
[Unit]
Description=oneround client
Documentation=https://pypi.org/project/oneround/

[Service]
ExecStart={" ".join(map(_quoted, command))}
Environment=PYTHONUNBUFFERED=1
# SIGTERM works as Ctrl-C does: the step at work is finished, and a snapshot of training is kept.
KillSignal=SIGTERM
TimeoutStopSec={_STOP_SECONDS}
SuccessExitStatus=130
Restart=on-failure
RestartSec={_AGAIN_SECONDS}
# 2: the command line is wrong; 3: the coordinator's key has changed. Both need a person.
RestartPreventExitStatus=2 3
# When memory runs out, this ends before anything that a person works with.
OOMScoreAdjust=500
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy=default.target
"""


def agent(command: Sequence[str], home: Path) -> bytes:
    """The launchd agent that runs a command line."""
    log = str(log_file(home))
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": list(command),
            "EnvironmentVariables": {"PYTHONUNBUFFERED": "1"},
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": _AGAIN_SECONDS,
            "ExitTimeOut": _STOP_SECONDS,  # SIGTERM works as Ctrl-C does; see the systemd unit
            "LowPriorityIO": True,
            "Umask": 0o077,
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
    )


def install(service: Service, command_line: Sequence[str]) -> str:
    """Write the file, over an earlier one too, and start the service; returns why it could not be started, if so.

    Raises:
        NotEnough: the file cannot be written.
    """
    try:
        service.file.parent.mkdir(parents=True, exist_ok=True)
        files.replace(service.file, [service.content(command_line)])
    except OSError as error:
        raise NotEnough(f"cannot write {service.file}: {error.strerror}") from error
    for command in service.clear:
        _run(command)
    return next((why for command in service.start if (why := _run(command))), "")


def uninstall(service: Service) -> bool:
    """Stop the service and remove its file; returns whether there was one."""
    was_installed = service.file.exists()
    if was_installed:
        for command in service.stop:
            _run(command)
        service.file.unlink(missing_ok=True)
        for command in service.forget:
            _run(command)
    return was_installed


def _run(command: Command) -> str:
    """Why a command failed, by the last line of its output; empty if it did not."""
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    if child.returncode == 0:
        return ""
    lines = (child.stderr or child.stdout).strip().splitlines()
    return (lines[-1] if lines else f"{command[0]} failed").rstrip(".")


def _quoted(word: str) -> str:
    """A word as systemd reads it, with nothing in it expanded (systemd.syntax(7), systemd.unit(5))."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./~-]+", word, flags=re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return '"' + "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in escaped) + '"'
