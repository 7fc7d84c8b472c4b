"""What all our command lines share: errors as sentences, and exit codes that scripts can rely on."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console

from converters.errors import NotEnough, OneroundError

INTERRUPTED = 130


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run an app and exit: 0 done, 2 usage, and otherwise the error's own code (see errors.py); 130 when interrupted.

    No traceback, unless ONEROUND_DEBUG is set.
    """
    try:
        app(prog_name=name)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            Console(stderr=True).print(f"\nInterrupted. Nothing is lost: run the same {name} command to go on.")
        raise
    except OneroundError as error:
        if os.environ.get("ONEROUND_DEBUG"):
            raise
        fail(error)
    except OSError as error:
        if os.environ.get("ONEROUND_DEBUG"):
            raise
        fail(NotEnough(f"this machine does not let us: {error}"))
    except Exception as error:
        if os.environ.get("ONEROUND_DEBUG"):
            raise
        fail(OneroundError(f"a fault in {name}: {type(error).__name__}: {error}", hint=f"ONEROUND_DEBUG=1 {name} …"))
    sys.exit(0)


def fail(error: OneroundError) -> NoReturn:
    """Print what happened, why, and what to do next; exit with the error's code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("[red]Error:[/red] ", end="")
    console.print(str(error), markup=False)
    if error.hint:
        console.print("Try: ", style="dim", end="")
        console.print(error.hint, markup=False)
    sys.exit(error.exit_code)
