"""Many clients over one connection, each with a key of its own that follows from its label."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.connection import remote as remotes
from edge_client.connection.channel import Connection
from edge_client.connection.identity import ClientKey, Pins
from edge_client.connection.remote import Remote
from oneround import signing, tls
from oneround.v1 import federation_pb2 as pb


@cache
def me(label: str) -> ClientKey:
    """The same key for the same label, everywhere and always."""
    return ClientKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(label.encode()).digest()))


def speaking(remote: Remote, label: str, token: str = "") -> Remote:
    """The same connection in another client's mouth."""
    there = remote.connection
    return Remote(Connection(there.server, there.channel, there.certificate), me=me(label), token=token)


async def session(remote: Remote) -> list[tuple[str, str]]:
    """The metadata with which a call is this client's."""
    return (await remote._signed_in()).metadata


async def signed_in(remote: Remote, label: str, token: str = "") -> pb.SignInRequest:
    """What a client sends to sign in, and has not sent yet."""
    asked = await remote.connection.stub.Challenge(pb.ChallengeRequest())
    coordinator = tls.fingerprint(remote.certificate) if remote.certificate else ""
    who = me(label)
    signature = signing.sign(who.key, signing.sign_in(coordinator, asked.challenge, token))
    return pb.SignInRequest(key=who.public_key, challenge=asked.challenge, signature=signature, token=token)


class Stub:
    """A FederationStub whose calls carry a session: that of the client whose lease is in the request, if it has joined
    here, and else the speaker's. Metadata that is given goes as it is."""

    def __init__(self, crowd: Crowd, speaker: Remote) -> None:
        self._crowd, self._speaker = crowd, speaker

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._crowd.plain, method)

        def said(request: Any, **options: Any) -> Any:
            if "metadata" in options or method in ("Challenge", "SignIn"):
                return call(request, **options)
            if method == "Upload":
                return self._upload(call, request, **options)
            return call(request, metadata=self._known(getattr(request, "lease", "")), **options)

        return said

    def _known(self, lease: str) -> list[tuple[str, str]]:
        speaker = self._crowd.holders.get(lease, self._speaker)
        assert speaker.connection.session, "a speaker has signed in before it calls the stub"
        return speaker.connection.metadata

    async def _upload(self, call: Any, messages: Any, **options: Any) -> pb.Receipt:
        """Nothing is sent before the first message says whose lease it is."""
        rest = aiter(messages) if hasattr(messages, "__aiter__") else _each(messages)
        first = await anext(rest, None)

        async def all_of_them() -> AsyncIterator[pb.UploadRequest]:
            if first is not None:
                yield first
            async for message in rest:
                yield message

        receipt: pb.Receipt = await call(
            all_of_them(), metadata=self._known(first.lease if first is not None else ""), **options
        )
        return receipt


async def _each(messages: Any) -> AsyncIterator[Any]:
    for message in messages:
        yield message


class Crowd(Remote):
    """A connection that says what concerns a lease as the client whose lease it is, and all else as itself."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote.connection, remote.me)
        self.plain = remote.connection.stub
        self.holders: dict[str, Remote] = {}  # by lease
        self._speakers: dict[str, Remote] = {}
        self._stub = Stub(self, self)

    @classmethod
    async def over(cls, remote: Remote) -> Crowd:
        """One that has signed in."""
        made = cls(remote)
        await made._signed_in()
        return made

    async def speaker(self, label: str) -> Remote:
        """A client of this crowd, signed in."""
        if label not in self._speakers:
            self._speakers[label] = speaking(self, label)
        await self._speakers[label]._signed_in()
        return self._speakers[label]

    async def stub(self, label: str) -> Any:
        """The stub as one client calls it."""
        return Stub(self, await self.speaker(label))

    async def join_as(self, label: str, request: pb.JoinRequest) -> pb.JoinReply:
        speaker = await self.speaker(label)
        reply = await speaker.join(request)
        self.holders[reply.lease] = speaker
        return reply

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        return await self.holders.get(beat.lease, super()).heartbeat(beat)  # type: ignore[arg-type]

    async def withdraw(self, lease: str) -> None:
        await self.holders.get(lease, super()).withdraw(lease)  # type: ignore[arg-type]

    async def report(self, lease: str, evaluation: pb.Evaluation) -> None:
        await self.holders.get(lease, super()).report(lease, evaluation)  # type: ignore[arg-type]

    async def upload(self, lease, declaration, file, on_bytes):  # type: ignore[no-untyped-def]
        return await self.holders.get(lease, super()).upload(lease, declaration, file, on_bytes)


@asynccontextmanager
async def connected(address: str, state: Path) -> AsyncIterator[Crowd]:
    """A crowd over a new connection; `state` is where the coordinator's key is pinned."""
    async with remotes.connect(address, Pins(state), lambda *_: None) as remote:
        yield await Crowd.over(remote)
