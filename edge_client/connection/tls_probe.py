"""Looking at the certificate of whoever answers at an address, before anything is said."""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from edge_client.connection.trust import ShownCertificate
from oneround.errors import BadData, Refused, Unreachable, UsageError

SECONDS = 10.0


@dataclass(frozen=True)
class ClientCertificate:
    """This client's own certificate and key (PEM files), for coordinators that ask for one."""

    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        """The key and the certificate, PEM."""
        return self.key.read_bytes(), self.certificate.read_bytes()

    def load(self, context: ssl.SSLContext) -> None:
        """Let a connection show it.

        Raises:
            UsageError: the files are not there, or are no certificate and its key.
        """
        hint = "--certificate FILE --certificate-key FILE, both PEM, the key without a password"
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            why = (error.reason or str(error)).replace("_", " ").lower()
            raise UsageError(
                f"{self.certificate} and {self.key} are no certificate and its key: {why}", hint=hint
            ) from error
        except OSError as error:
            raise UsageError(f"cannot read {self.certificate} and {self.key}: {error.strerror}", hint=hint) from error


async def look(server: str, own: ClientCertificate | None = None) -> ShownCertificate:
    """What the one at HOST:PORT shows; it has proven to hold the certificate's key, and is not trusted by that.

    Raises:
        Unreachable: nobody answers there, or not with TLS.
        Refused: it asks for a client's certificate, and takes none or not this one.
    """
    try:
        return await _look(server, own)
    except _HungUp:  # as one that ends just now does once, and one that turns us away each time
        try:
            return await _look(server, own)
        except _HungUp as twice:
            raise _turned_away(server, own) from twice


class _HungUp(Exception):
    """After all had seemed well: TLS 1.3 lets a server turn a client away when the client believes to be connected."""


async def _look(server: str, own: ClientCertificate | None) -> ShownCertificate:
    host, port = host_and_port(server)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if own is not None:
        own.load(context)
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            try:
                if not await reader.read(1):  # a server of HTTP/2 speaks first
                    raise _HungUp
            except (ConnectionError, ssl.SSLError) as error:
                raise _HungUp from error
            finally:
                writer.transport.abort()
    except ssl.SSLError as error:
        raise _no_tls(server, error) from error
    except TimeoutError as error:
        raise unreachable(server, f"no answer in {SECONDS:.0f} s") from error
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that cannot be a name
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise unreachable(server, why) from error
    shown = ShownCertificate(server, ssl.DER_cert_to_PEM_cert(certificate).encode())
    try:
        shown.fingerprint, shown.earlier  # noqa: B018  # whoever answers may show anything
    except ValueError as error:
        raise BadData(f"the server at {server} presents a certificate that cannot be read: {error}") from error
    return shown


def host_and_port(server: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 address without its brackets.

    Raises:
        UsageError: it is none.
    """
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{server!r} is not HOST:PORT", hint="edge-client join --server host:50051")
    return host.strip("[]"), int(port)


async def speaks_tls(server: str) -> bool:
    """Whether the one at an address shows a certificate; False also when nobody is there."""
    try:
        await look(server)
    except Refused:
        return True
    except (Unreachable, BadData):
        return False
    return True


def unreachable(server: str, why: str) -> Unreachable:
    return Unreachable(
        f"no coordinator answers at {server}" + (f": {why}" if why else ""),
        hint="check the address and that `coordinator serve` runs there; then run the same command again",
    )


def _turned_away(server: str, own: ClientCertificate | None) -> Refused:
    if own is None:
        reason = (
            f"the coordinator at {server} lets in only clients with a certificate that its operator's CA has signed"
        )
        return Refused(reason, hint="ask the operator for one; then add --certificate FILE --certificate-key FILE")
    return Refused(
        f"the coordinator at {server} does not take the certificate in {own.certificate}: another CA has signed it, or "
        "it has ended",
        hint="ask the operator for one that their CA has signed",
    )


def _no_tls(server: str, error: ssl.SSLError) -> Unreachable:
    if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"):
        return Unreachable(
            f"the one at {server} answers without TLS, and nothing is said to it: anybody could read along",
            hint="check the address; a coordinator on this machine that runs with --insecure wants --insecure here too",
        )
    return unreachable(server, f"no TLS there: {error.reason}")
