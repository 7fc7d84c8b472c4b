"""`coordinator serve`: the daemon and its servers in one process, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer
from grpc_health.v1 import health

from coordinator import discovery
from coordinator import metrics as metering
from coordinator.auth import certificates, identity
from coordinator.cli import client as control
from coordinator.cli import tables
from coordinator.cli.output import DEFAULT_STATE, BlobsUrl, Database, State, out
from coordinator.daemon import Daemon
from coordinator.jobs import spec as jobs
from coordinator.rpc import server, transport
from oneround import command, lan, tls
from oneround.errors import NotEnough, UsageError
from oneround.v1 import federation_pb2 as pb

commands = typer.Typer()

DRAIN_SECONDS = 10.0
# How long a thread may keep the event loop from Python. The default, 5 ms, adds up where several talk to the database.
SWITCH_SECONDS = 0.0002


@dataclass(frozen=True)
class Served:
    """What a daemon serves, how and where. `address` is HOST:PORT as it was asked for."""

    state: Path
    address: str
    identity: identity.Identity
    certificates: transport.Certificates
    insecure: bool
    reflect: bool
    advertise: bool  # on the local network


@commands.command(epilog="Example: coordinator serve --listen 0.0.0.0:50051 --job clinic-notes.toml")
def serve(
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "0.0.0.0:50051",
    state: State = DEFAULT_STATE,
    job: Annotated[list[Path] | None, typer.Option(help="A job file to open at once; may be repeated.")] = None,
    database: Database = "",
    blobs: BlobsUrl = "",
    metrics: Annotated[str, typer.Option(help="HOST:PORT to serve Prometheus metrics on; none if empty.")] = "",
    reflection: Annotated[bool, typer.Option("--reflection", help="Let grpcurl and such list the services.")] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Your own certificate (PEM, its chain after it) instead of one made here.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of --tls-certificate (PEM).")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of this CA (PEM); mutual TLS.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; only on loopback addresses.")] = False,
    insecure_anywhere: Annotated[
        bool, typer.Option("--insecure-anywhere", help="No TLS on any address: whoever is on the way reads along.")
    ] = False,
    no_advertise: Annotated[
        bool, typer.Option("--no-advertise", help="Do not make this coordinator known on the local network.")
    ] = False,
) -> None:
    """Run the daemon until it is told to stop (Ctrl-C or SIGTERM); it drains, and starts again where it was."""
    if insecure and not (insecure_anywhere or lan.is_loopback(listen)):
        raise UsageError(
            f"--insecure is for loopback, and {listen} is not",
            hint="leave --insecure out; --insecure-anywhere, if nobody else is on that network",
        )
    insecure = insecure or insecure_anywhere
    own = _own_files(tls_certificate, tls_key, client_ca, insecure)
    authority = certificates.authority(client_ca) if client_ca else b""
    _check_address(listen, "--listen HOST:PORT, as 0.0.0.0:50051")
    if metrics:
        _check_address(metrics, "--metrics HOST:PORT, as 127.0.0.1:9464")
    specs = [jobs.read(file) for file in job or []]
    own_identity = _identity(state, own)
    state = state.resolve()
    shown = transport.Certificates(own_identity, partial(identity.load_or_create, state, own), authority)
    served = Served(state, listen, own_identity, shown, insecure, reflection, advertise=not (insecure or no_advertise))
    _log_to_stderr()
    _open_many_files()
    sys.setswitchinterval(SWITCH_SECONDS)
    with command.only_one(state, "coordinator"):
        daemon = Daemon(state, database, blobs=blobs, key=own_identity.key)
        with _metrics(daemon, metrics):
            asyncio.run(_serve(daemon, served, specs))


async def _serve(daemon: Daemon, served: Served, specs: Sequence[pb.JobSpec]) -> None:
    healthy = health.aio.HealthServicer()
    grpc_server, address = server.create(
        daemon,
        served.identity,
        served.address,
        insecure=served.insecure,
        healthy=healthy,
        reflect=served.reflect,
        certificates=served.certificates,
    )
    statuses = [await daemon.operator.submit(spec) for spec in specs]  # can take minutes; an interrupt just ends it
    stop = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    await grpc_server.start()
    fingerprint = served.identity.fingerprint
    control.announce(served.state, address, insecure=served.insecure, fingerprint=fingerprint)
    _tell(served, address, statuses)

    host, _, port = address.rpartition(":")
    advertising = [asyncio.create_task(discovery.advertise(host, int(port), fingerprint))] if served.advertise else []
    running = asyncio.create_task(daemon.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running  # a fault of ours; let it be seen
    await healthy.enter_graceful_shutdown()
    await grpc_server.stop(grace=DRAIN_SECONDS)
    for task in (running, *advertising):
        task.cancel()
    await asyncio.gather(running, *advertising, return_exceptions=True)
    daemon.release()


def _tell(served: Served, address: str, statuses: Sequence[pb.JobStatus]) -> None:
    """Print where the daemon listens, by which key it is known, its jobs, and how to take part."""
    out.print(f"Listening on [bold]{address}[/bold]" + (" without TLS" if served.insecure else ""))
    if not served.insecure:
        out.print(f"Key fingerprint  {tls.grouped(served.identity.fingerprint)}")
        for before in tls.earlier(served.identity.certificate)[-1:]:
            out.print(f"  it follows     {tls.grouped(before)}")
    for status in statuses:
        out.print(tables.line(status))
    port = address.rpartition(":")[2]
    out.print(f"To take part:  edge-client join --server {tables.reachable_host(address)}:{port}")


def _identity(state: Path, own: identity.OwnFiles | None) -> identity.Identity:
    try:
        state.mkdir(parents=True, exist_ok=True)
        return identity.load_or_create(state, own)
    except OSError as error:
        raise NotEnough(f"cannot write to {state}: {error.strerror}", hint="coordinator serve --state DIR") from error


@contextmanager
def _metrics(daemon: Daemon, address: str) -> Iterator[None]:
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    with metering.served(host.strip("[]"), int(port), metering.Jobs(daemon.all_statuses, daemon.event_counts)) as bound:
        out.print(f"Metrics on http://{host}:{bound}/metrics", markup=False)
        yield


def _open_many_files() -> None:
    """As many as the system lets us: every client is a socket, and macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < limit:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _own_files(
    certificate: Path | None, key: Path | None, client_ca: Path | None, insecure: bool
) -> identity.OwnFiles | None:
    """The operator's own certificate and key, if they are given.

    Raises:
        UsageError: one is given without the other, or with --insecure.
    """
    if insecure and (certificate or key or client_ca):
        raise UsageError("without TLS there are no certificates", hint="leave --insecure out")
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("a certificate needs its key", hint="--tls-certificate FILE --tls-key FILE")
    return identity.OwnFiles(certificate.absolute(), key.absolute())


def _check_address(listen: str, hint: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{listen} is not an address", hint=hint)


def _log_to_stderr() -> None:
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # a traceback whenever somebody hangs up
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
