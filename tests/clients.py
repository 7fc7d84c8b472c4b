"""Many clients over one connection, each with a key of its own that follows from its label."""

from __future__ import annotations

import hashlib
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.identity import Me
from edge_client.remote import Remote
from oneround.v1 import federation_pb2 as pb


@cache
def me(label: str) -> Me:
    """The same key for the same label, everywhere and always."""
    return Me(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(label.encode()).digest()))


def speaking(remote: Remote, label: str) -> Remote:
    """The same connection in another client's mouth."""
    return Remote(remote.server, remote.channel, remote.certificate, me(label))


class Crowd(Remote):
    """A connection that says what concerns a lease as the client whose lease it is, and all else as itself."""

    def __init__(self, remote: Remote) -> None:
        self.go_on_over(remote)
        self._speakers: dict[str, Remote] = {}
        self._of_lease: dict[str, Remote] = {}

    def speaker(self, label: str) -> Remote:
        if label not in self._speakers:
            self._speakers[label] = speaking(self, label)
        return self._speakers[label]

    async def join_as(self, label: str, request: pb.JoinRequest) -> pb.JoinReply:
        speaker = self.speaker(label)
        reply = await speaker.join(request)
        self._of_lease[reply.lease] = speaker
        return reply

    def holding(self, lease: str) -> Remote:
        """Who speaks for a lease."""
        return self._of_lease.get(lease, super())  # type: ignore[arg-type]

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        return await self.holding(beat.lease).heartbeat(beat)

    async def withdraw(self, lease: str) -> None:
        await self.holding(lease).withdraw(lease)

    async def report(self, lease: str, evaluation: pb.Evaluation) -> None:
        await self.holding(lease).report(lease, evaluation)

    async def upload(self, lease, declaration, file, on_bytes):  # type: ignore[no-untyped-def]
        return await self.holding(lease).upload(lease, declaration, file, on_bytes)
