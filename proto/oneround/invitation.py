"""One line to paste that lets somebody in: where the coordinator is, its key, and a token.

    oneround://HOST:PORT/#TOKEN+FINGERPRINT

The token and the fingerprint (base64url, without padding) stand behind the `#`, which no browser sends anywhere.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

SCHEME = "oneround://"
_HOST = r"[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]"  # nothing that a terminal would obey
_LINK = re.compile(rf"oneround://((?:{_HOST}):[0-9]{{1,5}})/?#([A-Za-z0-9_-]{{8,128}})(?:\+([A-Za-z0-9_-]{{43}}))?")


@dataclass(frozen=True)
class Invitation:
    """What a link says. `server` is HOST:PORT; `fingerprint` is hex, and empty for a coordinator without TLS."""

    server: str
    token: str = ""
    fingerprint: str = ""

    def __str__(self) -> str:
        key = base64.urlsafe_b64encode(bytes.fromhex(self.fingerprint)).decode().rstrip("=")
        return f"{SCHEME}{self.server}/#{self.token}" + (f"+{key}" if key else "")


def read(link: str) -> Invitation:
    """Raises ValueError when it is none."""
    match = _LINK.fullmatch(link.strip())
    if not match:
        raise ValueError("an invitation reads oneround://HOST:PORT/#TOKEN+FINGERPRINT")
    server, token, key = match.groups()
    try:
        return Invitation(server, token, base64.urlsafe_b64decode(f"{key}=").hex() if key else "")
    except binascii.Error as error:
        raise ValueError(f"the fingerprint in it is damaged: {error}") from error
