"""`coordinator token` and `coordinator clients`: who may come in."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import segno
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from coordinator.cli import client as control
from coordinator.cli.output import DEFAULT_STATE, Json, State, Why, out, print_json
from coordinator.cli.tables import reachable_host
from coordinator.jobs import spec as jobs
from oneround import invitation
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb

token = typer.Typer(
    help="Tokens that let people into a job that takes one.",
    epilog="Example: coordinator token create clinic-notes --note 'ward 3'",
    no_args_is_help=True,
)
clients = typer.Typer(help="Who has asked for something here, and what they may take part in.")

OneJob = Annotated[str, typer.Option("--job", metavar="JOB", help="The job; every job if left out.")]
ClientName = Annotated[str, typer.Argument(metavar="CLIENT", help="The client's id, or its name if only one has it.")]


@token.command(epilog="Example: coordinator token create clinic-notes --note 'ward 3'")
def create(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="The job; every job if left out.")] = "",
    expires: Annotated[str, typer.Option(help="How long it holds, as 30m, 24h or 7d.")] = "7d",
    uses: Annotated[
        int, typer.Option(help="How many machines may come in by it; 0: any number.", min=0, max=1_000_000)
    ] = 1,
    note: Annotated[str, typer.Option(help="Whom it is for; shown in the list.")] = "",
    address: Annotated[str, typer.Option(help="HOST:PORT at which clients reach this coordinator.")] = "",
    qr: Annotated[bool, typer.Option("--qr", help="Show the line as a QR code too.")] = False,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Print one line to paste on the other machine. It is shown once; here only a digest of the token is kept."""
    request = pb.CreateTokenRequest(job=job, holds_seconds=jobs.seconds(expires, "--expires"), uses=uses, note=note)
    listening = control.listening(state)
    host, _, port = (address or listening.address).rpartition(":")
    if not address:
        host = reachable_host(listening.address)
    if not host or not port.isdecimal():
        raise UsageError(f"{address!r} is not HOST:PORT", hint="--address host:50051")
    created = asyncio.run(control.create_token(state, request))
    link = str(invitation.Invitation(f"{host}:{port}", created.secret, listening.fingerprint))
    if as_json:
        print_json(created.token, link=link)
        return
    whom = "one machine" if uses == 1 else f"{uses} machines" if uses else "any number of machines"
    until = time.strftime("%a %d %b %Y, %H:%M", time.localtime(created.token.expires_unix))
    out.print(f"Token {created.token.id} lets {whom} into {job or 'every job'}, until {until}.", markup=False)
    out.print("On the other machine:")
    print(f"edge-client join '{link}'")  # in one line, however narrow the terminal is
    if qr:
        segno.make(link, error="l").terminal(sys.stdout, compact=True)


@token.command("list", epilog="Example: coordinator token list")
def list_tokens(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """All tokens, newest first."""
    reply = asyncio.run(control.tokens(state))
    if as_json:
        print_json(reply)
        return
    if not reply.tokens:
        out.print("No tokens yet. Make one:  coordinator token create JOB")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("token", "job", "for", "used", "holds until", ""):
        table.add_column(heading)
    for token in reply.tokens:
        over = "revoked" if token.revoked else "expired" if token.expires_unix < time.time() else ""
        table.add_row(
            token.id,
            escape(token.job or "every job"),
            escape(token.note),
            f"{token.used} of {token.uses}" if token.uses else str(token.used),
            time.strftime("%d %b %Y, %H:%M", time.localtime(token.expires_unix)),
            over or ("used up" if token.uses and token.used >= token.uses else ""),
        )
    out.print(table)


@token.command(epilog="Example: coordinator token revoke 3f9a01bc")
def revoke(
    id: Annotated[str, typer.Argument(metavar="TOKEN", help="The token's id, from the list.")],
    state: State = DEFAULT_STATE,
) -> None:
    """From now on nobody comes in by a token. Who has come in stays: see `coordinator clients`."""
    gone = asyncio.run(control.revoke_token(state, id))
    out.print(f"Token {gone.id} lets nobody in any more.", markup=False)


@clients.callback(invoke_without_command=True, epilog="Example: coordinator clients --job clinic-notes")
def listed(context: typer.Context, job: OneJob = "", state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Who has asked for something here, and what they may take part in; who was seen last comes first."""
    if context.invoked_subcommand is not None:
        return
    reply = asyncio.run(control.clients(state, job))
    if as_json:
        print_json(reply)
        return
    if not reply.clients:
        out.print("Nobody has asked for anything yet.")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("client", "name", "last seen", "may take part in"):
        table.add_column(heading)
    for client in reply.clients:
        table.add_row(
            client.id,
            escape(client.name),
            time.strftime("%d %b %Y, %H:%M", time.localtime(client.last_seen_unix)),
            escape(f"nothing: banned{f' ({client.why})' if client.why else ''}" if client.banned else _passes(client)),
        )
    out.print(table)
    for client in reply.clients:
        for passing in client.passes:
            if not passing.granted and not client.banned:
                out.print(
                    f"Let {client.id} in:  coordinator clients approve {client.id} --job {passing.job}", markup=False
                )


def _passes(client: pb.KnownClient) -> str:
    return ", ".join(
        (passing.job or "every job") + (f" ({passing.how})" if passing.granted else " (has asked)")
        for passing in client.passes
    )


@clients.command(epilog="Example: coordinator clients approve 3f9a01bc22d4 --job clinic-notes")
def approve(client: ClientName, job: OneJob = "", state: State = DEFAULT_STATE) -> None:
    """Let a client take part in a job. Compare its id with what `edge-client join` shows over there."""
    _settle(state, client, job, pb.SETTLEMENT_APPROVE, "")


@clients.command(epilog="Example: coordinator clients refuse 3f9a01bc22d4 --job clinic-notes")
def refuse(client: ClientName, job: OneJob = "", state: State = DEFAULT_STATE) -> None:
    """Take back that a client may take part, or what it has asked. In an open job it may join again: see ban."""
    _settle(state, client, job, pb.SETTLEMENT_REFUSE, "")


@clients.command(epilog="Example: coordinator clients ban 3f9a01bc22d4 --why 'a lost laptop'")
def ban(client: ClientName, why: Why = "", state: State = DEFAULT_STATE) -> None:
    """Keep a client out of everything. What it has contributed stays: see `coordinator exclude`."""
    _settle(state, client, "", pb.SETTLEMENT_BAN, why)


@clients.command(epilog="Example: coordinator clients unban 3f9a01bc22d4")
def unban(client: ClientName, state: State = DEFAULT_STATE) -> None:
    """End a ban."""
    _settle(state, client, "", pb.SETTLEMENT_UNBAN, "")


def _settle(state: Path, client: str, job: str, settlement: pb.Settlement.ValueType, why: str) -> None:
    request = pb.SettleRequest(client=client, job=job, settlement=settlement, why=why)
    settled = asyncio.run(control.settle(state, request))
    may = "nothing: banned" if settled.banned else _passes(settled) or "nothing but open jobs"
    out.print(f"{settled.id} ({settled.name}) may now take part in {may}.", markup=False)
