"""What all our command lines share: errors as sentences, and exit codes that scripts can rely on."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from oneround.errors import NotEnough, OneroundError, UsageError
from oneround.text import printable

INTERRUPTED = 130


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run an app and exit: 0 done, 2 usage, and otherwise the error's own code (see errors.py); 130 when interrupted.

    No traceback, unless ONEROUND_DEBUG is set.
    """
    try:
        app(prog_name=name)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            again = shlex.join([name, *sys.argv[1:]])
            print(f"\nInterrupted. What was done is kept. To go on:\n  {again}", file=sys.stderr)
        raise
    except BrokenPipeError:  # `edge-client status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("ONEROUND_DEBUG"):
            raise
        if isinstance(error, OneroundError):
            fail(error)
        if isinstance(error, MemoryError):
            fail(NotEnough("there is not enough memory for this"))
        if isinstance(error, OSError):
            fail(NotEnough(f"this machine does not let us: {error}"))
        fail(OneroundError(f"a fault in {name}: {type(error).__name__}: {error}", hint=f"ONEROUND_DEBUG=1 {name} …"))
    sys.exit(0)


def fail(error: OneroundError) -> NoReturn:
    """Print what happened, why, and what to do next; exit with the error's code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    console.print("[red]Error:[/red] ", end="")
    console.print(printable(str(error)), markup=False)
    if error.hint:
        console.print("Try: ", style="dim", end="")
        console.print(printable(error.hint), markup=False)
    sys.exit(error.exit_code)


@contextmanager
def only_one(folder: Path, program: str) -> Iterator[None]:
    """Hold a folder for this process alone; the lock goes with the process, however it ends.

    Raises:
        UsageError: another process holds it.
    """
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another {program} is at work over {folder}", hint="wait for it, or give --state"
            ) from None
        yield
