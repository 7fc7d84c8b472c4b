"""`edge-client`: take part in a job, and use what comes of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box as boxes
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_client import backends, consent, outbox, session
from edge_client.cli import options, receipts, results, service
from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.connection import connect, discovery, identity, job_check, retry, tls_probe
from edge_client.connection.remote import Remote
from edge_client.connection.target import ANY, Target, reaching
from edge_client.doctor import run as examination
from edge_client.doctor.finding import Case
from edge_client.ui.screen import Screen
from oneround import command, tls
from oneround.errors import BadData, Refused, Unreachable, UsageError
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Fine-tune a shared model on files that stay on this machine; send one adapter; use the result.",
    epilog="Example: edge-client join --server host:50051 --data notes/",
    no_args_is_help=True,
)

app.add_typer(results.app)
app.add_typer(
    receipts.app,
    name="receipt",
    help="What proves that a contribution is safe, and whether a publication has it.",
    epilog="Example: edge-client receipt verify clinic-notes --manifest clinic-notes/manifest.json",
)


@app.command(epilog="Example: edge-client join --server host:50051 --data notes/")
@reaching
def join(
    link: Annotated[
        str, typer.Argument(metavar="[LINK]", help="What the operator gave you: oneround://…", show_default=False)
    ] = "",
    target: Target = ANY,
    job: Annotated[str, typer.Option(help="The job; not needed when only one is open.")] = "",
    data: options.Data = Path("data"),
    backend: options.Backend = "auto",
    model: options.Model = None,
    name: options.Name = "",
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(help="Seconds after which it is kept how far training is.", min=0)
    ] = session.SAVE_SECONDS,
    again: Annotated[
        bool, typer.Option("--again", help="Train anew and replace what was sent, where the operator allows it.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the result is published.")] = False,
    yes: options.Yes = False,
    precision: options.Precision = "auto",
    bits: options.Bits = 0,
    when: options.When = options.ALWAYS,
    min_battery: options.MinBattery = options.MANNERS.min_battery,
    min_memory: options.MinMemory = options.MANNERS.min_memory,
    nice: options.Nice = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Take part in a job, start to receipt. Run it again after any interruption, and it goes on."""
    screen = Screen(as_json)
    if link and target.server:
        raise UsageError("the invitation says where the coordinator is", hint="leave --server out")
    target = replace(target, server=link) if link else target
    pausing = options.pausing(when, min_battery, min_memory, nice)
    options.make(state)
    waiting = any(box.trained() and not box.receipt() for box in outbox.all_outboxes(state))
    if not waiting and not data.exists():  # what is trained needs no data any more
        raise BadData(f"there is no data at {data}", hint="edge-client join --data FILE_OR_FOLDER")
    with screen.busy("loading the training backend"):
        chosen = backends.choose(backend)
    participant = session.Participant(
        state=state,
        name=name or socket.gethostname(),
        data=data,
        backend=chosen,
        model=model,
        skip_bad_rows=skip_bad_rows,
        save_every=save_every,
        again=again,
        pausing=pausing,
        setup=options.setup(chosen, precision, bits),
    )

    async def run() -> None:
        async with connect.connected(target, state, screen) as remote:
            with command.only_one(state, "edge-client join"):
                wanted = consent.meant((await remote.jobs()).jobs, job or remote.token_job)
                offered = await remote.describe(wanted.spec.name)
                job_check.check(offered)
                name = offered.spec.name
                request = participant.request(name)
                terms = consent.terms(offered, request, remote.fingerprint)
                before = [replace(terms, key=key) for key in identity.Pins(state).earlier(remote.fingerprint)]
                if not consent.given(outbox.all_outboxes(state), terms, *before) and not await consent.ask(
                    screen,
                    terms,
                    consent.asks(offered, request.machine, state, model),
                    server=remote.server,
                    deadline=offered.deadline_unix,
                    data=data,
                    yes=yes,
                ):
                    screen.say("declined")
                    raise typer.Exit(Refused.exit_code)
                receipt = await session.take_part(
                    remote, name, replace(participant, consent=terms.digest, agreed=offered), screen
                )
            if wait:
                joined = outbox.find(state, receipt.job).joined()
                assert joined is not None, "find looks at joined jobs"
                deadline = joined.job.deadline_unix
                await retry.through(remote, deadline, screen, lambda _: _until_published(remote, receipt.job, screen))

    asyncio.run(run())


@app.command(epilog="Example: edge-client discover")
def discover(
    seconds: Annotated[float, typer.Option(help="How long to listen.", min=0.1, max=600)] = discovery.LOOK_SECONDS,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """The coordinators that make themselves known on this network."""
    with Screen(as_json).busy("listening to this network"):
        found = asyncio.run(discovery.look(seconds))
    pinned = set(identity.Pins(state).all().values())
    if as_json:
        rows = [{**asdict(each), "known": each.fingerprint in pinned} for each in found]
        print(json.dumps(rows, indent=2))
        return
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if not found:
        out.print(
            "No coordinator makes itself known on this network. One elsewhere: edge-client join --server HOST:PORT"
        )
        return
    table = Table(box=boxes.SIMPLE_HEAD)
    for heading in ("name", "address", "known here", "key fingerprint"):
        table.add_column(heading)
    for each in found:
        known = "yes" if each.fingerprint in pinned else "no"
        table.add_row(escape(each.name), "\n".join(each.addresses), known, tls.grouped(each.fingerprint))
    out.print(table)
    out.print("Compare the fingerprint with the one that `coordinator serve` printed; anybody can use a name.")


@app.command("trust", epilog="Example: edge-client trust host:50051 FINGERPRINT")
def trust_key(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the coordinator is.")],
    fingerprint: Annotated[
        list[str], typer.Argument(metavar="FINGERPRINT", help="Its key, as `coordinator serve` prints it over there.")
    ],
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Pin a coordinator's key: the first time, or in the place of another one after it was set up anew."""
    tls_probe.host_and_port(address)
    target, pins = Target(address, "".join(fingerprint)), identity.Pins(state)
    before = pins.all().get(address, "")
    pins.pin(address, target.trusted)
    screen = Screen(as_json)
    if before and before != target.trusted:
        screen.say("unpinned", server=address, fingerprint=tls.grouped(before))
    screen.say("trusted", server=address, fingerprint=tls.grouped(target.trusted))


@app.command(epilog="Example: edge-client doctor --server host:50051 --data notes/")
@reaching
def doctor(
    target: Target = ANY,
    job: Annotated[str, typer.Option(help="The job; not needed when only one is open.")] = "",
    data: Annotated[Path, typer.Option(help="A file or folder: .jsonl, .json, .parquet or .txt.")] = Path("data"),
    backend: Annotated[str, typer.Option(help="auto, torch or mlx.")] = "auto",
    model: Annotated[Path | None, typer.Option(help="The base model's folder, if it is on this machine.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")
    ] = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """What would stop this machine from taking part, and the way out. It joins no job and changes nothing.

    Takes what join takes. The exit code is that of the first problem, 0 if there is none.
    """
    case = Case(state, target, job, data, backend, model, skip_bad_rows)
    raise typer.Exit(asyncio.run(examination.report(case, Screen(as_json), as_json=as_json)))


@app.command(epilog="Example: edge-client status")
def status(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """The jobs that this machine has joined, and how far each is."""
    boxes_ = outbox.all_outboxes(state)
    rows = []
    for box in boxes_:
        joined, trained, receipt = box.joined(), box.trained(), box.receipt()
        assert joined is not None, "all_outboxes lists joined jobs"
        stage = "contributed" if receipt else "trained, not sent" if trained else "joined, not trained"
        rows.append(
            {
                "job": joined.job.spec.name,
                "server": box.server(),
                "stage": stage,
                "examples": trained.num_examples if trained else None,
                "bytes": receipt.size if receipt else None,
                "folder": str(box.folder),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if not rows:
        out.print("No job joined yet. Start with:  edge-client join --server HOST:PORT --data FILE_OR_FOLDER")
        return
    table = Table(box=boxes.SIMPLE_HEAD)
    for heading in ("job", "server", "stage", "examples", "sent"):
        table.add_column(heading)
    for row in rows:
        sent = f"{row['bytes']:,} bytes" if row["bytes"] else ""
        table.add_row(str(row["job"]), str(row["server"]), str(row["stage"]), str(row["examples"] or ""), sent)
    out.print(table)


@app.command(epilog="Example: edge-client leave clinic-notes")
@reaching
def leave(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    target: Target = ANY,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Take part no more: what was sent is left out of everything that is published from now on."""
    screen = Screen(as_json)
    box = outbox.find(state, job)
    joined = box.joined()
    assert joined is not None, "find looks at joined jobs"

    async def run() -> None:
        async with connect.connected(target, state, screen, job) as remote:
            await remote.withdraw(joined.lease)

    asyncio.run(run())
    box.keep_left()
    screen.say("left", job=job)


async def _until_published(remote: Remote, job: str, screen: Screen) -> None:
    shown = ""
    async for status in remote.watch(job):
        state = pb.State.Name(status.state).removeprefix("STATE_").lower()
        if status.state == pb.STATE_PUBLISHED:
            screen.say("published", job=job, version=status.publications[-1].version)
            return
        if status.state in (pb.STATE_EXPIRED, pb.STATE_FAILED, pb.STATE_CANCELLED):
            raise Refused(f"nothing will be published: {one_line(status.reason)}")
        if state != shown:
            screen.say("waiting", state=state)
            shown = state
    raise Unreachable("the coordinator ended the conversation", hint="edge-client pull, later")


app.command(epilog="Example: edge-client stay --server host:50051 --accept 'clinic-*' --data notes/")(service.stay)
app.command(epilog="Example: edge-client install-service --server host:50051 --accept 'clinic-*' --data notes/")(
    service.install_service
)
app.command(epilog="Example: edge-client uninstall-service")(service.uninstall_service)


def main() -> None:
    """The console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"  # whatever a base's files name: all that a client fetches is the coordinator's
    try:
        command.run(app, "edge-client")
    except SystemExit as end:
        if "mlx.core" in sys.modules and isinstance(end.code, int):
            # What MLX keeps for the training thread is freed while Python ends, which can abort the process, receipt or
            # not (ml-explore/mlx#4110). Nothing of ours is left to be done here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


if __name__ == "__main__":
    main()
