"""Who calls: a client proves that it holds its key, and gets a session that stands for it for a while.

Challenges and sessions carry a MAC of this coordinator, so that it knows its own without keeping them; it keeps only
the challenges that were answered in the last minute. A restart ends no session.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ed25519

from oneround import signing
from oneround.errors import NotSignedIn, UsageError
from oneround.v1 import federation_pb2 as pb

CHALLENGE_SECONDS = 60.0
SESSION_SECONDS = 3600.0
SCHEME = "Session "

_TIME = struct.Struct(">d")
_MAC = 32  # bytes
_NONCE = 16
_ID = 16


class Sessions:
    """Challenges and sessions of one coordinator, by its secret."""

    def __init__(self, secret: bytes, fingerprint: str, clock: Callable[[], float]) -> None:
        """`fingerprint` is of the key that clients see; empty without TLS."""
        self._secret, self._fingerprint, self._clock = secret, fingerprint, clock
        self._answered: dict[bytes, float] = {}

    def challenge(self) -> bytes:
        """Something to sign."""
        content = secrets.token_bytes(_NONCE) + _TIME.pack(self._clock())
        return content + self._mac(b"challenge", content)

    def authenticate(self, request: pb.SignInRequest) -> str:
        """The client_id of the key that signed a challenge of ours. Each challenge can be answered once.

        Raises:
            NotSignedIn: the challenge is not ours, too old or used, or the signature is not the key's.
            UsageError: the key is not an Ed25519 key.
        """
        content, mac = request.challenge[:-_MAC], request.challenge[-_MAC:]
        if len(content) != _NONCE + _TIME.size or not hmac.compare_digest(mac, self._mac(b"challenge", content)):
            raise NotSignedIn("the challenge is not one of this coordinator's")
        now = self._clock()
        if not 0 <= now - _TIME.unpack(content[_NONCE:])[0] <= CHALLENGE_SECONDS:
            raise NotSignedIn("the challenge is too old", hint="run the same command again")
        try:
            key = signing.public(request.key)
        except ValueError as error:
            raise UsageError(f"the client's key cannot be read: {error}") from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise UsageError("a client's key must be an Ed25519 key")
        statement = signing.sign_in(self._fingerprint, request.challenge, request.token)
        if not signing.signed(request.key, statement, request.signature):
            raise NotSignedIn("the signature is not this key's, or not for this coordinator")
        while self._answered and now - next(iter(self._answered.values())) > CHALLENGE_SECONDS:  # oldest first
            del self._answered[next(iter(self._answered))]
        if request.challenge in self._answered:
            raise NotSignedIn("this challenge has been used")
        self._answered[request.challenge] = now
        return signing.client_id(request.key)

    def issue(self, client_id: str) -> str:
        """A session for a client."""
        content = bytes.fromhex(client_id) + _TIME.pack(self._clock() + SESSION_SECONDS)
        return base64.urlsafe_b64encode(content + self._mac(b"session", content)).decode()

    def client_id(self, session: str) -> str:
        """The client_id that a session stands for.

        Raises:
            NotSignedIn: the session is not one of ours, or is over.
        """
        try:
            whole = base64.urlsafe_b64decode(session)
        except (ValueError, binascii.Error):
            whole = b""
        content, mac = whole[:-_MAC], whole[-_MAC:]
        if len(content) != _ID + _TIME.size or not hmac.compare_digest(mac, self._mac(b"session", content)):
            raise NotSignedIn("this call needs a session", hint="update oneround, or run the same command again")
        if self._clock() > _TIME.unpack(content[_ID:])[0]:
            raise NotSignedIn("the session is over", hint="run the same command again")
        return content[:_ID].hex()

    def _mac(self, kind: bytes, content: bytes) -> bytes:
        return hmac.digest(self._secret, kind + b" " + content, hashlib.sha256)
