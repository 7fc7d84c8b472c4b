"""A channel to a coordinator, opened only if its key is the one that is meant; and the session on it."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc

from edge_client.connection import tls_probe, trust
from edge_client.connection.identity import ClientKey, Pins
from oneround import signing, stream, tls
from oneround.errors import Refused
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

CALL_SECONDS = 60.0
_OPTIONS = [
    ("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
]

# Called before a key is pinned; may ask, and raise Refused.
OnFirstUse = Callable[[trust.ShownCertificate], Awaitable[None] | None]


class Connection:
    """A channel to one coordinator at one address, and a client's session on it."""

    def __init__(self, server: str, channel: grpc.aio.Channel, certificate: bytes = b"", *, before: str = "") -> None:
        """`server` is HOST:PORT; `certificate` is PEM, and empty without TLS; `before` is the key that was pinned until
        now, and that the certificate's follows."""
        self.server, self.channel, self.certificate, self.before = server, channel, certificate, before
        self.stub = rpc.FederationStub(channel)
        self.session = ""  # empty: there is none, or the coordinator takes it no more
        self._renew_at = 0.0
        self.signing_in = asyncio.Lock()

    @property
    def fingerprint(self) -> str:
        """The key's, in hex; empty without TLS."""
        return tls.fingerprint(self.certificate) if self.certificate else ""

    @property
    def has_to_sign_in(self) -> bool:
        """Whether there is no session, or half of its time is over."""
        return not self.session or time.monotonic() > self._renew_at

    async def sign_in(self, me: ClientKey, token: str) -> pb.SignInReply:
        """Begin a session as the client with this key. A `token` to come in by goes along."""
        self.session = ""
        challenge: pb.ChallengeReply = await self.stub.Challenge(pb.ChallengeRequest(), timeout=CALL_SECONDS)
        signature = signing.sign(me.key, signing.sign_in(self.fingerprint, challenge.challenge, token))
        request = pb.SignInRequest(key=me.public_key, challenge=challenge.challenge, signature=signature, token=token)
        reply: pb.SignInReply = await self.stub.SignIn(request, timeout=CALL_SECONDS)
        self.session, self._renew_at = reply.session, time.monotonic() + reply.holds_seconds / 2
        return reply

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What makes a call the session's client's."""
        return [("authorization", f"Session {self.session}")]


@asynccontextmanager
async def opened(
    server: str,
    pins: Pins,
    on_first_use: OnFirstUse,
    *,
    key: str = "",
    trusted: str = "",
    own: tls_probe.ClientCertificate | None = None,
    insecure: bool = False,
) -> AsyncIterator[Connection]:
    """A connection to the coordinator at HOST:PORT whose key is the pinned one, or follows it.

    `key` is that of one that has moved: another one is taken for nobody. `trusted` is the key that a person has named,
    which is pinned whatever was pinned at this address before. `own` is shown to those who ask for a client's
    certificate.

    Raises:
        Refused: its key has changed, or is not the one that is trusted.
        Unreachable: nobody answers at this address.
    """
    if insecure:
        if await tls_probe.speaks_tls(server):
            raise Refused(f"the coordinator at {server} speaks TLS", hint="leave --insecure out")
        async with grpc.aio.insecure_channel(server, _OPTIONS) as channel:
            yield Connection(server, channel)
        return
    shown = await tls_probe.look(server, own)
    if key and not shown.has(key):
        raise tls_probe.unreachable(server, "another one answers there")
    pinned = pins.by_address()
    standing = trust.standing(shown, pinned)
    if trusted:
        trust.require_named(shown, trusted)
    else:
        trust.require(shown, standing, pinned, pins.state)
    trust.require_dates(shown.certificate, datetime.datetime.now(datetime.UTC))
    if standing is trust.KeyStanding.NEW and not (trusted or key) and (asking := on_first_use(shown)) is not None:
        await asking
    pins.pin(server, shown.fingerprint, shown.earlier)
    # The certificate just seen is the only root: whoever answers on this channel must hold its key.
    credentials = grpc.ssl_channel_credentials(shown.certificate, *(own.read() if own else ()))
    name = ("grpc.ssl_target_name_override", tls.name(shown.certificate))
    async with grpc.aio.secure_channel(server, credentials, [*_OPTIONS, name]) as channel:
        yield Connection(server, channel, shown.certificate, before=trust.left_behind(shown, pinned))
