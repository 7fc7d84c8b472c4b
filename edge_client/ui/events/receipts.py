"""`receipt show` and `receipt verify`."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Bytes, Event, File, Fingerprint, Sha256, Share, UnixTime, Words


@dataclass(frozen=True)
class ReceiptKept(Event):
    """A receipt that this machine has."""

    job: str
    job_id: str
    client: str
    digest: Sha256
    size: Bytes
    received: str
    received_unix: UnixTime
    by: Words
    file: File

    template = (
        "Receipt for [bold]{job}[/bold], of {received}\n"
        "  signed by  {by}\n"
        "  sent       {size:,} bytes\n"
        "  sha256     {digest}\n"
        "  client     {client}\n"
        "  file       {file}"
    )


@dataclass(frozen=True)
class NoReceipt(Event):
    """This machine has no receipt, or none for the job."""

    of: Words

    template = "No receipt yet{of}. One comes with:  edge-client join --server HOST:PORT --data FILE_OR_FOLDER"


@dataclass(frozen=True)
class ReceiptHolds(Event):
    """The signature of a receipt is that of a trusted key."""

    job: str
    job_id: str
    client: str
    digest: Sha256
    size: Bytes
    received: str
    received_unix: UnixTime
    by: Words
    fingerprint: Fingerprint

    template = (
        "[green]The receipt holds.[/green]\n"
        "  signed by  {by}\n"
        "  key        {fingerprint}\n"
        "  job        {job}\n"
        "  received   {received}, {size:,} bytes\n"
        "  sha256     {digest}\n"
        "  client     {client}"
    )


@dataclass(frozen=True)
class AdapterFits(Event):
    """The receipt is for the adapter that was named."""

    file: File

    template = "[green]It is for this adapter:[/green] {file}"


@dataclass(frozen=True)
class TakesPart(Event):
    """The contribution is part of the publication, with this share of the mean."""

    version: int
    job: str
    weight: Share
    why: Words

    template = "[green]It is part of v{version} of {job}[/green], with {weight:.1%} of the mean: {why}"


@dataclass(frozen=True)
class TakesNoPart(Event):
    """The contribution is not part of the publication."""

    version: int
    job: str
    weight: Share
    why: Words

    template = "[yellow]It is no part of v{version} of {job}:[/yellow] {why}"
