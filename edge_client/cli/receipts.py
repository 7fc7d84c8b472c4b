"""The commands `edge-client receipt show` and `receipt verify`; neither needs a coordinator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from edge_client import outbox
from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.connection.identity import Pins
from edge_client.proofs import manifests, receipts, signers
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import stream, tls
from oneround.errors import BadData, Refused
from oneround.v1 import federation_pb2 as pb

app = typer.Typer(no_args_is_help=True)


class _Described(TypedDict):
    job: str
    job_id: str
    client: str
    digest: str
    size: int
    received: str
    received_unix: float


@app.command(epilog="Example: edge-client receipt show clinic-notes")
def show(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="The job's name. Left out: all of them.")] = "",
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """The receipts that this machine has, and their files. They hold no secret, and can be given to anybody."""
    screen = Screen(as_json)
    boxes = [outbox.find(state, job)] if job else outbox.all_outboxes(state)
    receipts_kept = [(box, receipt) for box in boxes if (receipt := box.receipt()) is not None]
    for box, receipt in receipts_kept:
        screen.say(events.ReceiptKept(**_described(receipt), by=_signer(receipt, state), file=str(box.receipt_file)))
    if not receipts_kept:
        screen.say(events.NoReceipt(f" for {job}" if job else ""))


@app.command(epilog="Example: edge-client receipt verify receipt.json --manifest clinic-notes/manifest.json")
def verify(
    receipt: Annotated[str, typer.Argument(metavar="FILE|JOB", help="A receipt's file, or a job of this machine.")],
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter that should have been received.", show_default=False)
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="The manifest.json of a publication, from `pull`: is it part of that?", show_default=False),
    ] = None,
    fingerprint: Annotated[
        str,
        typer.Option(help="The coordinator's key, where this machine has not pinned it.", show_default=False),
    ] = "",
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Check a receipt, without a coordinator: who signed it, for which adapter, and whether a publication has it.

    That a contribution is part of a publication and that it is none are both answers, and exit with 0.
    """
    screen = Screen(as_json)
    trusted = signers.trusted(Pins(state), fingerprint)
    checked = receipts.read(_file(receipt, state))
    key = receipts.signer(checked)
    signed_by = signers.owners(key, trusted, "this receipt")
    screen.say(events.ReceiptHolds(**_described(checked), by=" and ".join(signed_by), fingerprint=tls.grouped(key)))
    if adapter is not None:
        _require_adapter(checked, adapter)
        screen.say(events.AdapterFits(str(adapter)))
    if manifest is not None:
        screen.say(_part(checked, signed_by, manifest, trusted))


def _require_adapter(receipt: pb.Receipt, adapter: Path) -> None:
    """Raises BadData when a receipt is not for an adapter."""
    if not adapter.is_file():
        raise BadData(f"there is no adapter at {adapter}")
    digest = stream.digest(adapter)
    if digest != receipt.digest:
        raise BadData(f"the receipt is for another adapter than {adapter}, whose SHA-256 is {digest}")


def _part(
    receipt: pb.Receipt, signed_by: Sequence[str], file: Path, trusted: signers.Keys
) -> events.TakesPart | events.TakesNoPart:
    """Whether a publication has the contribution, by its manifest's file.

    Raises:
        BadData: the manifest is not signed by the coordinator that signed the receipt.
    """
    signed = manifests.open_signed(file)
    if not set(signed_by) & set(signers.owners(signed.signer, trusted, str(file))):
        raise BadData(f"{file} is signed by another coordinator than the receipt: {tls.grouped(signed.signer)}")
    part = manifests.part(signed.manifest, receipt)
    answer = events.TakesPart if part.weight > 0 else events.TakesNoPart
    return answer(version=signed.manifest.version, job=signed.manifest.job_name, weight=part.weight, why=part.why)


def _file(file_or_job: str, state: Path) -> Path:
    """A file, or that of a job's receipt here.

    Raises:
        Refused: it is neither.
    """
    if Path(file_or_job).is_file():
        return Path(file_or_job)
    try:
        file = outbox.find(state, file_or_job).receipt_file
    except Refused:
        raise Refused(
            f"{file_or_job} is neither a receipt's file nor a job of this machine", hint="edge-client receipt show"
        ) from None
    if not file.exists():
        raise Refused(f"this machine has no receipt for {file_or_job!r} yet", hint="edge-client status")
    return file


def _described(receipt: pb.Receipt) -> _Described:
    received = time.strftime("%a %d %b %Y, %H:%M", time.localtime(receipt.received_unix))
    return {
        "job": receipt.job,
        "job_id": receipt.job_id,
        "client": receipt.client_id,
        "digest": receipt.digest,
        "size": receipt.size,
        "received": received,
        "received_unix": receipt.received_unix,
    }


def _signer(receipt: pb.Receipt, state: Path) -> str:
    """Who signed a receipt that is kept here, for a person to read."""
    try:
        return " and ".join(signers.owners(receipts.signer(receipt), signers.trusted(Pins(state), ""), "it"))
    except BadData as error:
        return f"nobody known: {error}"
