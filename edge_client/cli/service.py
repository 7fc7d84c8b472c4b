"""`edge-client install-service` and `uninstall-service`: `stay` as a service of the user's."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path

from edge_client.cli import agreement, options
from edge_client.cli.options import DEFAULT_STATE, UNATTENDED, Json, State, TrainingOptions, WatchOptions, Yes
from edge_client.cli.spread import as_arguments, spread
from edge_client.connection import connect
from edge_client.connection.identity import Pins
from edge_client.connection.target import ANY, Target
from edge_client.ui import events
from edge_client.ui.screen import Screen
from edge_client.unattended import service
from edge_client.unattended.service import Service
from oneround.errors import Unreachable


@spread
def install_service(
    watch: WatchOptions,
    target: Target = ANY,
    training: TrainingOptions = UNATTENDED,
    yes: Yes = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Let this machine take part by itself: `edge-client stay` as a service of yours. Again replaces it."""
    screen = Screen(as_json)
    watch.require_names()
    training.require_data()
    user_service = service.of_this_user()
    options.make_folder(state)
    participant = training.participant(state, screen)  # a wrong option is an error now, and not in a log
    asyncio.run(agreement.for_every_job(participant, watch.accept, target.address, screen, yes))
    address = asyncio.run(_reach_once(target, state, screen))
    command = command_line(watch, target.pinned_at(address), training, state)
    why_not_started = service.install(user_service, command)
    screen.say(
        events.ServiceWritten(
            file=str(user_service.file),
            accept=" or ".join(watch.accept),
            server=address,
            data=str(training.data.absolute()),
            when=" and ".join(training.when),
        )
    )
    _report_start(user_service, why_not_started, screen)


def uninstall_service(as_json: Json = False) -> None:
    """Stop and remove the service that `install-service` wrote."""
    user_service, screen = service.of_this_user(), Screen(as_json)
    file = str(user_service.file)
    screen.say(events.Uninstalled(file) if service.uninstall(user_service) else events.NotInstalled(file))


def command_line(watch: WatchOptions, target: Target, training: TrainingOptions, state: Path) -> list[str]:
    """What the service runs: `stay` with all of its options, from any folder."""
    return [
        *(sys.executable, "-P", "-m", "edge_client.cli", "stay", "--yes"),
        *as_arguments(target),
        *as_arguments(watch),
        *as_arguments(training.from_anywhere()),
        *("--state", str(state.absolute())),
    ]


async def _reach_once(target: Target, state: Path, screen: Screen) -> str:
    """The coordinator's address. Its key is pinned now, while a person looks on; a service has nobody to ask.

    Raises:
        Unreachable: it does not answer, and its key is not known here.
    """
    try:
        async with connect.connected(target, state, screen) as remote:
            return remote.server
    except Unreachable:
        if target.address and (target.plain or target.address in Pins(state).all()):
            return target.address
        raise


def _report_start(user_service: Service, why_not_started: str, screen: Screen) -> None:
    if why_not_started:
        commands = "\n".join(f"  {shlex.join(command)}" for command in user_service.start)
        screen.say(events.ServiceWaits(why_not_started, commands))
    else:
        screen.say(events.ServiceRuns(user_service.log))
    if user_service.needs_login:
        screen.say(events.Linger())
