"""The commands of a client that stays: `edge-client stay`, and the service that runs it."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import socket
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated

import typer

from edge_client import backends, consent
from edge_client.cli import options
from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.connection import connect as reach
from edge_client.connection import identity
from edge_client.connection.remote import Remote
from edge_client.connection.target import ANY, Target, reaching
from edge_client.pausing import sensors
from edge_client.pausing.policy import When
from edge_client.session import Participant
from edge_client.ui.screen import Screen
from edge_client.unattended import service, watch
from oneround.errors import BadData, Refused, Unreachable, UsageError
from oneround.v1 import federation_pb2 as pb

Accept = Annotated[
    list[str],
    typer.Option(help="Jobs to take part in: a name, or a pattern such as 'clinic-*'. May be given more than once."),
]
Nice = Annotated[bool, typer.Option(help="Let other programs go first, on the CPU and the disk.")]


@reaching
def stay(
    accept: Accept,
    target: Target = ANY,
    data: options.Data = Path("data"),
    backend: options.Backend = "auto",
    model: options.Model = None,
    name: options.Name = "",
    skip_bad_rows: options.SkipBadRows = False,
    precision: options.Precision = "auto",
    bits: options.Bits = 0,
    when: options.When = options.PLUGGED_IN,
    min_battery: options.MinBattery = options.MANNERS.min_battery,
    min_memory: options.MinMemory = options.MANNERS.min_memory,
    nice: Nice = True,
    yes: options.Yes = False,
    look_every: Annotated[float, typer.Option(help="Seconds between two looks for new jobs.", min=1)] = (
        watch.LOOK_SECONDS
    ),
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Stay, and take part once in every accepted job as it appears. Ends with Ctrl-C."""
    screen = Screen(as_json)
    _check(accept, data)
    pausing = options.pausing(when, min_battery, min_memory, nice)
    options.make(state)
    with screen.busy("loading the training backend"):
        chosen = backends.choose(backend)
    participant = Participant(
        state=state,
        name=name or socket.gethostname(),
        data=data,
        backend=chosen,
        model=model,
        skip_bad_rows=skip_bad_rows,
        pausing=pausing,
        setup=options.setup(chosen, precision, bits),
    )

    def connect() -> AbstractAsyncContextManager[Remote]:
        return reach.connected(target, state, screen)

    async def run() -> None:
        await _agree(screen, participant.request(""), accept, target.address, data, yes)
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # a service is ended by it
        await watch.JobWatcher(connect, accept, participant, screen, look_seconds=look_every).stay()

    asyncio.run(run())


@reaching
def install_service(
    accept: Accept,
    target: Target = ANY,
    data: options.Data = Path("data"),
    backend: options.Backend = "auto",
    model: options.Model = None,
    name: options.Name = "",
    skip_bad_rows: options.SkipBadRows = False,
    precision: options.Precision = "auto",
    bits: options.Bits = 0,
    when: options.When = options.PLUGGED_IN,
    min_battery: options.MinBattery = options.MANNERS.min_battery,
    min_memory: options.MinMemory = options.MANNERS.min_memory,
    nice: Nice = True,
    yes: options.Yes = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Let this machine take part by itself: `edge-client stay` as a service of yours. Again replaces it."""
    screen = Screen(as_json)
    _check(accept, data)
    installed = service.here()
    if When.IDLE in when:
        sensors.require_idle()
    options.make(state)
    with screen.busy("loading the training backend"):
        chosen = backends.choose(backend)
    options.setup(chosen, precision, bits)  # a wrong one is an error now, and not in a log
    participant = Participant(state, name or socket.gethostname(), data, chosen)
    asyncio.run(_agree(screen, participant.request(""), accept, target.address, data, yes))
    place = asyncio.run(_reach_once(target, state, screen))
    command = [sys.executable, "-P", "-m", "edge_client.cli", "stay", "--yes", *target.again(place)]
    for pattern in accept:
        command += ["--accept", pattern]
    for each in when:
        command += ["--when", each.value]
    command += ["--data", str(data.absolute()), "--backend", backend, "--state", str(state.absolute())]
    command += ["--precision", precision, "--bits", str(bits)]
    command += ["--min-battery", f"{min_battery:g}", "--min-memory", f"{min_memory:g}"]
    command += ["--model", str(model.absolute())] if model else []
    command += ["--name", name] if name else []
    command += ["--skip-bad-rows"] if skip_bad_rows else []
    command += [] if nice else ["--no-nice"]
    on_a_mac = installed.file.suffix == ".plist"
    content = service.agent(command, Path.home()) if on_a_mac else service.unit(command).encode()
    why = service.install(installed, content)
    screen.say(
        "service",
        file=str(installed.file),
        accept=" or ".join(accept),
        server=place,
        data=str(data.absolute()),
        when=" and ".join(when),
    )
    if why:
        lines = "\n".join(f"  {shlex.join(line)}" for line in installed.start)
        screen.say("service_waits", why=why, commands=lines)
    else:
        screen.say("service_runs", log=installed.log)
    if not on_a_mac:
        screen.say("linger")


def uninstall_service(as_json: Json = False) -> None:
    """Stop and remove the service that `install-service` wrote."""
    installed = service.here()
    there = service.uninstall(installed)
    Screen(as_json).say("uninstalled" if there else "not_installed", file=str(installed.file))


async def _reach_once(target: Target, state: Path, screen: Screen) -> str:
    """The coordinator's address. Its key is pinned now, while a person looks on; a service has nobody to ask.

    Raises:
        Unreachable: it does not answer, and its key is not known here.
    """
    try:
        async with reach.connected(target, state, screen) as remote:
            return remote.server
    except Unreachable:
        if target.address and (target.plain or target.address in identity.Pins(state).all()):
            return target.address
        raise


async def _agree(
    screen: Screen, request: pb.JoinRequest, accept: list[str], server: str, data: Path, yes: bool
) -> None:
    if not await consent.ask_standing(screen, request, accept, server=server, data=data, yes=yes):
        screen.say("declined")
        raise typer.Exit(Refused.exit_code)


def _check(accept: list[str], data: Path) -> None:
    for pattern in accept:
        if not re.fullmatch(r"[a-z0-9._*?\[\]!-]+", pattern):
            raise UsageError(f"{pattern!r} can be no job's name", hint="--accept NAME, or a pattern: 'clinic-*'")
    if not data.exists():
        raise BadData(f"there is no data at {data}", hint="add --data FILE_OR_FOLDER")
