"""How a coordinator is to be reached, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

from edge_client.connection.tls_probe import ClientCertificate
from oneround import invitation, lan, tls
from oneround.errors import UsageError
from oneround.invitation import Invitation

Server = Annotated[
    str,
    typer.Option(
        "--server",
        help="The coordinator's HOST:PORT, or the oneround://… that its operator gave you. Left out: the last one "
        "joined, or the one on this network.",
        show_default=False,
    ),
]
Trust = Annotated[
    str,
    typer.Option(
        "--trust",
        metavar="FINGERPRINT",
        help="The key that the coordinator has, as `coordinator serve` prints it: it is pinned without a question.",
        show_default=False,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(help="Your own certificate (PEM), for a coordinator that asks for one.", show_default=False),
]
CertificateKey = Annotated[Path | None, typer.Option(help="Its key (PEM).", show_default="the same file")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS; for a coordinator on this machine.")]
InsecureAnywhere = Annotated[
    bool, typer.Option("--insecure-anywhere", help="No TLS to any machine: whoever is on the way reads along.")
]


@dataclass(frozen=True)
class Target:
    """How to reach a coordinator."""

    server: Server = ""
    trust: Trust = ""
    certificate: Certificate = None
    certificate_key: CertificateKey = None
    insecure: Insecure = False
    insecure_anywhere: InsecureAnywhere = False

    @cached_property
    def invited(self) -> Invitation:
        """What an invitation in the place of the address says; of a plain address that it is one.

        Raises:
            UsageError: it would be an invitation, and is none.
        """
        if not self.server.startswith(invitation.SCHEME):
            return Invitation(self.server)
        try:
            return invitation.read(self.server)
        except ValueError as error:
            raise UsageError(str(error), hint="paste the whole line, in quotes") from error

    @property
    def address(self) -> str:
        """HOST:PORT; empty if none was given."""
        return self.invited.server

    @property
    def token(self) -> str:
        """The secret of a token to come in by; empty if none."""
        return self.invited.token

    @property
    def plain(self) -> bool:
        """Without TLS."""
        return self.insecure or self.insecure_anywhere

    @property
    def own(self) -> ClientCertificate | None:
        """The client's own certificate."""
        if self.certificate is None:
            return None
        return ClientCertificate(self.certificate, self.certificate_key or self.certificate)

    @property
    def trusted(self) -> str:
        """The fingerprint that a person has named, or that an invitation has; empty if none.

        Raises:
            UsageError: it is none.
        """
        if self.trust and not tls.ungrouped(self.trust):
            raise UsageError(
                f"{self.trust!r} is no whole fingerprint, of 64 hexadecimal digits",
                hint="give all of it, as `coordinator serve` prints it, in quotes or without the spaces",
            )
        return tls.ungrouped(self.trust) or self.invited.fingerprint

    def require_allowed(self, address: str) -> None:
        """Raises:
        UsageError: without TLS only coordinators on this machine are spoken to, and there is no key to trust.
        """
        if self.plain and (self.trust or self.certificate):
            raise UsageError("without TLS there are no keys and certificates", hint="leave --insecure out")
        if self.insecure and not self.insecure_anywhere and not lan.is_loopback(address):
            raise UsageError(
                f"--insecure is for a coordinator on this machine, and {address} is another",
                hint="leave --insecure out; --insecure-anywhere, if nobody else is on that network",
            )

    def pinned_at(self, address: str) -> Target:
        """The same coordinator at an address, once its key is pinned; for a process that starts in another folder."""
        return replace(
            self,
            server=address,
            trust="",
            certificate=self.own.certificate.absolute() if self.own else None,
            certificate_key=self.own.key.absolute() if self.own else None,
        )


ANY = Target()
