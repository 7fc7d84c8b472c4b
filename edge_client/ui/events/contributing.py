"""From the upload to the publication."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Bytes, Event, Fingerprint, Sha256


@dataclass(frozen=True)
class ReceiptReceived(Event, event="receipt"):
    """The coordinator has stored the contribution, and has signed that it has."""

    size: Bytes
    digest: Sha256

    template = "[green]Receipt[/green]\n  sent      {size:,} bytes\n  sha256    {digest}"


@dataclass(frozen=True)
class ReceiptByAnyone(Event):
    """The receipt came without TLS, so that nothing shows whose key signed it."""

    fingerprint: Fingerprint

    template = "[yellow]Without TLS nothing shows whose key signed it.[/yellow] It is\n  {fingerprint}"


@dataclass(frozen=True)
class VerdictPending(Event, event="pending"):
    """The coordinator has not judged the contribution yet; the receipt holds in any case."""

    job: str

    template = "The coordinator has not judged it yet; `coordinator show {job}`, over there, will have the verdict."


@dataclass(frozen=True)
class Done(Event):
    """This machine's part is done, and it may go for good."""

    job: str

    template = "You may close this now. The result will be there with:\n  edge-client pull {job}"


@dataclass(frozen=True)
class WaitingForPublication(Event, event="waiting"):
    """With `--wait`: the state of the job, whenever it changes."""

    state: str

    template = "Waiting for the publication ({state})"


@dataclass(frozen=True)
class VersionPublished(Event, event="published"):
    """With `--wait`: the job has been published."""

    job: str
    version: int

    template = "[green]Published[/green] v{version}. Take it with:\n  edge-client pull {job}"
