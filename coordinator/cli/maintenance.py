"""`coordinator backup`, `restore`, `rotate-key` and `health`: looking after the daemon itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from coordinator.auth import identity
from coordinator.cli import client as control
from coordinator.cli.output import DEFAULT_STATE, BlobsUrl, Database, State, out
from coordinator.storage import backup as backups
from oneround import command, tls
from oneround.errors import Unreachable, UsageError
from oneround.text import human_size

commands = typer.Typer()


@commands.command(epilog="Example: coordinator backup /mnt/disk/oneround")
def backup(
    folder: Annotated[Path, typer.Argument(help="A folder; the same one again takes only what is new.")],
    state: State = DEFAULT_STATE,
    database: Database = "",
    blobs: BlobsUrl = "",
) -> None:
    """Copy everything that is known to a folder, while the daemon runs. Keep it as safe as the daemon's own."""
    done = backups.backup(state.resolve(), folder, database, blobs)
    out.print(
        f"Backed up {done.jobs} jobs, {done.files} new files, {human_size(done.bytes)}, to {folder}.", markup=False
    )


@commands.command(epilog="Example: coordinator restore /mnt/disk/oneround --state NEW-FOLDER")
def restore(
    folder: Annotated[Path, typer.Argument(help="What `coordinator backup` wrote.")],
    state: State = DEFAULT_STATE,
    database: Database = "",
    blobs: BlobsUrl = "",
) -> None:
    """Bring a backup back, into a state folder that is empty; every contribution's digest is checked."""
    done = backups.restore(folder, state, database, blobs)
    out.print(f"Restored {done.jobs} jobs, {done.files} files, {human_size(done.bytes)}.", markup=False)
    out.print(f"Start it:  coordinator serve --state {state}", markup=False)


@commands.command("rotate-key", epilog="Example: coordinator rotate-key")
def rotate_key(state: State = DEFAULT_STATE) -> None:
    """Give the coordinator a new key, while it is stopped. Clients that know the old one, which signs it, follow.

    For a change that is planned. A key that somebody else has got hold of can sign anything: remove key.pem then, and
    have every client accept the new key by hand.
    """
    with _stopped(state):
        before, after = identity.rotate(state)
    out.print(f"Old key  {tls.grouped(before)}")
    out.print(f"New key  {tls.grouped(after)}")
    out.print(f"Start it again:  coordinator serve --state {state}", markup=False)
    out.print("Clients that know the old key take the new one by themselves; tell both to whoever compares.")


@commands.command(epilog="Example: coordinator health")
def health(state: State = DEFAULT_STATE) -> None:
    """Whether the daemon on this machine serves: exit code 0, or 4."""
    if not asyncio.run(control.healthy(state)):
        raise Unreachable("the coordinator is shutting down")
    out.print("serving")


@contextmanager
def _stopped(state: Path) -> Iterator[None]:
    """Hold a state folder over which no daemon may run meanwhile.

    Raises:
        UsageError: one runs, or has never run.
    """
    if not (state / "key.pem").exists():
        raise UsageError(f"no coordinator has run over {state}", hint=f"coordinator serve --state {state}")
    with ExitStack() as locks:
        try:
            locks.enter_context(command.only_one(state, "coordinator"))
        except UsageError as error:
            error.hint = "stop the daemon first"
            raise
        yield
