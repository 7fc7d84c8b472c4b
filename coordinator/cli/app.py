"""`coordinator`: run the daemon, and talk to it."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer
from grpc_health.v1 import health as health_servicer
from rich.console import Console

from coordinator import discovery
from coordinator import metrics as metering
from coordinator.aggregate import METHODS
from coordinator.auth import certificates as certificate
from coordinator.auth import identity
from coordinator.cli import access, tables
from coordinator.cli import client as control
from coordinator.cli.output import DEFAULT_STATE, Json, State, Why, out, print_json
from coordinator.daemon import Daemon
from coordinator.jobs import spec as jobs_
from coordinator.publication import diff as diffs
from coordinator.rpc import server, transport
from coordinator.storage import backup as backups
from oneround import command, lan, tls
from oneround.errors import NotEnough, Unreachable, UsageError
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Announce fine-tuning jobs, take one adapter from each client, average, publish GGUFs.",
    epilog="Example: coordinator serve --job clinic-notes.toml",
    no_args_is_help=True,
)
app.add_typer(access.token, name="token")
app.add_typer(access.clients, name="clients")

JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
ClientName = Annotated[str, typer.Argument(metavar="CLIENT", help="The client's name, or its id from `show`.")]
Database = Annotated[str, typer.Option("--database", help="SQLAlchemy URL; SQLite in the state folder if empty.")]
BlobsUrl = Annotated[str, typer.Option("--blobs", help="fsspec URL for contributions; the state folder if empty.")]
DRAIN_SECONDS = 10.0
# How long a thread may keep the event loop from Python. The default, 5 ms, adds up where several talk to the database.
SWITCH_SECONDS = 0.0002


@app.command(epilog="Example: coordinator serve --listen 0.0.0.0:50051 --job clinic-notes.toml")
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
    authority = certificate.authority(client_ca) if client_ca else b""
    _check_address(listen, "--listen HOST:PORT, as 0.0.0.0:50051")
    if metrics:
        _check_address(metrics, "--metrics HOST:PORT, as 127.0.0.1:9464")
    specs = [jobs_.read(file) for file in job or []]
    try:
        state.mkdir(parents=True, exist_ok=True)
        who = identity.load_or_create(state, own)
    except OSError as error:
        raise NotEnough(f"cannot write to {state}: {error.strerror}", hint="coordinator serve --state DIR") from error
    _log_to_stderr()
    _open_many_files()
    sys.setswitchinterval(SWITCH_SECONDS)
    with command.only_one(state, "coordinator"):
        daemon = Daemon(state.resolve(), database, blobs=blobs, key=who.key)
        with _metrics(daemon, metrics):
            serving = _serve(
                daemon,
                listen,
                state.resolve(),
                specs,
                who,
                certificates=transport.Certificates(who, partial(identity.load_or_create, state, own), authority),
                insecure=insecure,
                reflect=reflection,
                known=not (insecure or no_advertise),
            )
            asyncio.run(serving)


async def _serve(
    daemon: Daemon,
    listen: str,
    state: Path,
    specs: list[pb.JobSpec],
    who: identity.Identity,
    *,
    certificates: transport.Certificates,
    insecure: bool,
    reflect: bool,
    known: bool,
) -> None:
    healthy = health_servicer.aio.HealthServicer()
    grpc_server, address = server.create(
        daemon, who, listen, insecure=insecure, healthy=healthy, reflect=reflect, certificates=certificates
    )
    statuses = [await daemon.submit(spec) for spec in specs]  # can take minutes; an interrupt just ends it
    stop = asyncio.Event()
    for wanted in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
    await grpc_server.start()
    control.announce(state, address, insecure=insecure, fingerprint=who.fingerprint)
    out.print(f"Listening on [bold]{address}[/bold]" + (" without TLS" if insecure else ""))
    if not insecure:
        out.print(f"Key fingerprint  {tls.grouped(who.fingerprint)}")
        for before in tls.earlier(who.certificate)[-1:]:
            out.print(f"  it follows     {tls.grouped(before)}")
    for status in statuses:
        out.print(tables.line(status))
    host, _, port = address.rpartition(":")
    out.print(f"To take part:  edge-client join --server {tables.reachable_host(address)}:{port}")

    telling = [asyncio.create_task(discovery.advertise(host, int(port), who.fingerprint))] if known else []
    running = asyncio.create_task(daemon.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running  # a fault of ours; let it be seen
    await healthy.enter_graceful_shutdown()
    await grpc_server.stop(grace=DRAIN_SECONDS)
    for task in (running, *telling):
        task.cancel()
    await asyncio.gather(running, *telling, return_exceptions=True)
    daemon.release()


@app.command(epilog="Example: coordinator submit clinic-notes.toml")
def submit(
    file: Annotated[Path, typer.Argument(help="The job, a TOML file.")],
    state: State = DEFAULT_STATE,
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
def jobs(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """All jobs of the running daemon."""
    found = asyncio.run(control.jobs(state))
    if as_json:
        print_json(pb.ListJobsReply(jobs=found))
    elif found:
        out.print(tables.jobs(found))
    else:
        out.print("No jobs yet. Open one:  coordinator submit JOB.toml")


@app.command(epilog="Example: coordinator show clinic-notes")
def show(
    job: JobName,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """One job: its clients, their progress and contributions, and what is published."""
    _show(asyncio.run(control.show(state, job)), as_json)


@app.command(epilog="Example: coordinator close clinic-notes")
def close(
    job: JobName,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Close a round now and publish what is in, below the quorum too; after a failure, publish again."""
    _show(asyncio.run(control.close(state, job)), as_json)


@app.command(epilog="Example: coordinator publish clinic-notes --method ties --density 0.2")
def publish(
    job: JobName,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; the job's own if empty.")] = "",
    server_learning_rate: Annotated[float, typer.Option(help="Multiplies the mean; 0: the job's own.")] = 0.0,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep.")] = None,
    byzantine_clients: Annotated[
        int | None, typer.Option(help="Bad clients that krum and trimmed-mean hold against.", min=0)
    ] = None,
    krum_keep: Annotated[int | None, typer.Option(help="Contributions that krum averages.", min=0)] = None,
    norm_bound: Annotated[float | None, typer.Option(help="Longest update for norm-clip, in medians.")] = None,
    adapter_rank: Annotated[int, typer.Option(help="Rank of the published adapter; -1: the job's own.")] = -1,
    why: Annotated[str, typer.Option(help="For the record; goes into the manifest.")] = "",
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Make a new version of what is in, by the job's method or another. Nobody trains again; old versions stay."""
    request = pb.PublishRequest(job=job, reason=why)
    if method:
        request.aggregate.method = method
    if server_learning_rate:
        request.aggregate.server_learning_rate = server_learning_rate
    parameters = pb.AggregateSpec(
        density=density, byzantine_clients=byzantine_clients, krum_keep=krum_keep, norm_bound=norm_bound
    )
    request.aggregate.MergeFrom(parameters)  # None is not set
    if adapter_rank >= 0:
        request.adapter_rank = adapter_rank
    _show(asyncio.run(control.publish(state, request)), as_json)


@app.command(epilog="Example: coordinator exclude clinic-notes ward-3 --why 'wrong folder'")
def exclude(
    job: JobName, client: ClientName, why: Why = "", state: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Take a contribution out; what is published already gets a new version without it."""
    _decide(job, client, pb.DECISION_EXCLUDE, why, state, as_json)


@app.command(epilog="Example: coordinator admit clinic-notes ward-3 --why 'a large ward'")
def admit(job: JobName, client: ClientName, why: Why = "", state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Let a contribution take part that was quarantined or excluded."""
    _decide(job, client, pb.DECISION_ADMIT, why, state, as_json)


@app.command(epilog="Example: coordinator replace clinic-notes ward-3")
def replace(
    job: JobName, client: ClientName, why: Why = "", state: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Let a client send another contribution in place of the one that is in: `edge-client join --again`, over there."""
    _decide(job, client, pb.DECISION_LET_REPLACE, why, state, as_json)


@app.command(epilog="Example: coordinator cancel clinic-notes")
def cancel(job: JobName, state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """End a round without a publication. What came in is kept until the job is deleted."""
    _show(asyncio.run(control.cancel(state, job)), as_json)


@app.command(epilog="Example: coordinator delete clinic-notes --yes")
def delete(
    job: JobName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Forget a job that is over: its contributions, its publications and all of their files."""
    if not yes:
        typer.confirm(f"Delete {job}, with every contribution and publication of it?", abort=True)
    asyncio.run(control.delete(state, job))
    out.print(f"Deleted {job}.", markup=False)


@app.command(epilog="Example: coordinator diff clinic-notes 1 2")
def diff(
    job: JobName,
    old: Annotated[int, typer.Argument(help="A version's number.")],
    new: Annotated[int, typer.Argument(help="Another one's.")],
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """What differs between two versions: who took part, how it was averaged, how far the adapter moved, its scores."""
    status = asyncio.run(control.show(state, job))
    folders = {publication.version: Path(publication.folder) for publication in status.publications}
    for version in (old, new):
        if version not in folders:
            raise UsageError(f"{job} has no version {version}", hint=f"coordinator show {job}")
    found = diffs.compare(folders[old], folders[new])
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        out.print(diffs.table(found))


@app.command(epilog="Example: coordinator backup /mnt/disk/oneround")
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


@app.command(epilog="Example: coordinator restore /mnt/disk/oneround --state NEW-FOLDER")
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


@app.command("rotate-key", epilog="Example: coordinator rotate-key")
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


@app.command(epilog="Example: coordinator health")
def health(state: State = DEFAULT_STATE) -> None:
    """Whether the daemon on this machine serves: exit code 0, or 4."""
    if not asyncio.run(control.healthy(state)):
        raise Unreachable("the coordinator is shutting down")
    out.print("serving")


def _decide(job: str, client: str, decision: pb.Decision.ValueType, why: str, state: Path, as_json: bool) -> None:
    request = pb.JudgeRequest(job=job, client=client, decision=decision, why=why)
    _show(asyncio.run(control.judge(state, request)), as_json)


@contextmanager
def _metrics(daemon: Daemon, address: str) -> Iterator[None]:
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    with metering.served(host.strip("[]"), int(port), metering.Jobs(daemon.every)) as bound:
        out.print(f"Metrics on http://{host}:{bound}/metrics", markup=False)
        yield


def _open_many_files() -> None:
    """As many as the system lets us: every client is a socket, and macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _show(status: pb.JobStatus, as_json: bool) -> None:
    if as_json:
        print_json(status)
    else:
        out.print(tables.job(status))


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


@contextmanager
def _stopped(state: Path) -> Iterator[None]:
    """Hold a state folder over which no daemon may run meanwhile.

    Raises:
        UsageError: one runs, or has never run.
    """
    if not (state / "key.pem").exists():
        raise UsageError(f"no coordinator has run over {state}", hint=f"coordinator serve --state {state}")
    with ExitStack() as held:
        try:
            held.enter_context(command.only_one(state, "coordinator"))
        except UsageError as error:
            error.hint = "stop the daemon first"
            raise
        yield


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


def main() -> None:
    """The console script."""
    command.run(app, "coordinator")


if __name__ == "__main__":
    main()
