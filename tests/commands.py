"""Running the product's own commands, as a person or a script does."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.waiting import LONG, eventually

BIN = Path(sys.executable).parent


def start(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command; its output is kept for `finish`."""
    command = [str(BIN / name), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def finish(process: subprocess.Popen[str], *, code: int = 0) -> tuple[str, str]:
    """Wait for a command, hold it to its exit code, and return what it printed on stdout and stderr."""
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == code, f"exit {process.returncode}, not {code}:\n{out}\n{err}"
    assert "Traceback" not in err and "Traceback" not in out, err
    return out, err


def run(name: str, *arguments: object, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    return finish(start(name, *arguments, cwd=cwd), code=code)


def events(out: str) -> dict[str, dict[str, Any]]:
    """The last of each kind of event that `--json` printed."""
    return {said["event"]: said for said in map(json.loads, out.splitlines())}


@contextmanager
def coordinator(state: Path, *options: object, advertise: bool = False) -> Iterator[str]:
    """A daemon on a free port of 127.0.0.1; gives its address, and ends it with SIGTERM."""
    log = (state.parent / f"{state.name}.log").open("w")
    command = [str(BIN / "coordinator"), "serve", "--listen", "127.0.0.1:0", "--state", str(state)]
    command += [*map(str, options), *([] if advertise else ["--no-advertise"])]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    announced = state / "daemon.json"
    announced.unlink(missing_ok=True)
    try:
        assert eventually(lambda: announced.exists() or process.poll() is not None)
        assert announced.exists(), Path(log.name).read_text()
        yield json.loads(announced.read_text())["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LONG) == 0, Path(log.name).read_text()
        log.close()


def script(folder: Path, name: str, text: str) -> None:
    """A program of the system, in a test's place of it."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
