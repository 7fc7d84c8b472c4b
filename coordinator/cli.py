"""`coordinator`: run the daemon, and talk to it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import platformdirs
import structlog
import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console

from converters import command
from converters.errors import NotEnough, UsageError
from coordinator import control, identity, server, tables
from coordinator import job as jobs_
from coordinator.daemon import Daemon
from oneround import tls
from oneround.v1 import federation_pb2 as pb

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Announce fine-tuning jobs, take one adapter from each client, average, publish GGUFs.",
    epilog="Example: coordinator serve --job clinic-notes.toml",
    no_args_is_help=True,
    add_completion=False,
)
# Without a terminal lines are as long as they need to be: a log or a pipe has no edge to wrap at.
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)

_DEFAULT_STATE = Path(platformdirs.user_data_dir("oneround")) / "coordinator"
State = Annotated[Path, typer.Option("--state", help="The daemon's folder.", show_default="the user's data folder")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]
DRAIN_SECONDS = 10.0


@app.command(epilog="Example: coordinator serve --listen 0.0.0.0:50051 --job clinic-notes.toml")
def serve(
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "0.0.0.0:50051",
    state: State = _DEFAULT_STATE,
    job: Annotated[list[Path] | None, typer.Option(help="A job file to open at once; may be repeated.")] = None,
    database: Annotated[str, typer.Option(help="SQLAlchemy URL; SQLite in the state folder if empty.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; only on loopback addresses.")] = False,
) -> None:
    """Run the daemon until it is told to stop (Ctrl-C or SIGTERM); it drains, and starts again where it was."""
    if insecure and not _is_loopback(listen):
        raise UsageError(f"--insecure is for loopback, and {listen} is not", hint="leave --insecure out")
    _check_address(listen)
    specs = [jobs_.read(file) for file in job or []]
    try:
        state.mkdir(parents=True, exist_ok=True)
        who = identity.load_or_create(state)
    except OSError as error:
        raise NotEnough(f"cannot write to {state}: {error.strerror}", hint="coordinator serve --state DIR") from error
    _log_to_stderr()
    with command.only_one(state, "coordinator"):
        asyncio.run(_serve(listen, state.resolve(), specs, database, who, insecure))


async def _serve(
    listen: str, state: Path, specs: list[pb.JobSpec], database: str, who: identity.Identity, insecure: bool
) -> None:
    daemon = Daemon(state, database)
    grpc_server, address = server.create(daemon, who, listen, insecure=insecure)
    statuses = [await daemon.submit(spec) for spec in specs]  # can take minutes; an interrupt just ends it
    stop = asyncio.Event()
    for wanted in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
    await grpc_server.start()
    control.announce(state, address, insecure=insecure)
    out.print(f"Listening on [bold]{address}[/bold]" + (" without TLS" if insecure else ""))
    if not insecure:
        out.print(f"Key fingerprint  {tls.grouped(who.fingerprint)}")
    for status in statuses:
        out.print(tables.line(status))
    port = address.rpartition(":")[2]
    out.print(f"To take part:  edge-client join --server {tables.reachable_host(address)}:{port}")

    running = asyncio.create_task(daemon.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running  # a fault of ours; let it be seen
    await grpc_server.stop(grace=DRAIN_SECONDS)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    daemon.release()


@app.command(epilog="Example: coordinator submit clinic-notes.toml")
def submit(
    file: Annotated[Path, typer.Argument(help="The job, a TOML file.")],
    state: State = _DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Open a job on the running daemon."""
    spec = jobs_.read(file)
    if sys.stderr.isatty():
        with Console(stderr=True).status("checking the job and preparing its base model"):
            status = asyncio.run(control.submit(state, spec))
    else:
        status = asyncio.run(control.submit(state, spec))
    _show(status, as_json)


@app.command(epilog="Example: coordinator jobs --json")
def jobs(state: State = _DEFAULT_STATE, as_json: Json = False) -> None:
    """All jobs of the running daemon."""
    found = asyncio.run(control.jobs(state))
    if as_json:
        _print_json(pb.ListJobsReply(jobs=found))
    elif found:
        out.print(tables.jobs(found))
    else:
        out.print("No jobs yet. Open one:  coordinator submit JOB.toml")


@app.command(epilog="Example: coordinator show clinic-notes")
def show(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    state: State = _DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """One job: its clients, their progress and contributions, and what is published."""
    _show(asyncio.run(control.show(state, job)), as_json)


@app.command(epilog="Example: coordinator close clinic-notes")
def close(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    state: State = _DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Close a round now and publish what is in, below the quorum too; after a failure, publish again."""
    _show(asyncio.run(control.close(state, job)), as_json)


def _show(status: pb.JobStatus, as_json: bool) -> None:
    if as_json:
        _print_json(status)
    else:
        out.print(tables.job(status))


def _print_json(message: Message) -> None:
    table = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    print(json.dumps(table, indent=2))


def _is_loopback(listen: str) -> bool:
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{listen} is not an address", hint="--listen HOST:PORT, as 0.0.0.0:50051")


def _log_to_stderr() -> None:
    lines = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else lines,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def main() -> None:
    """The console script."""
    command.run(app, "coordinator")


if __name__ == "__main__":
    main()
