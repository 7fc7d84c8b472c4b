"""How the server is reached: the certificate that it shows, renewed without a restart; and the operator's socket."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import structlog

from coordinator.auth.identity import Identity
from oneround.errors import NotEnough, OneroundError

LOOK_EVERY = 10.0  # seconds, at least, between two looks for a renewed certificate
_LONGEST_SOCKET = 100  # bytes; the system's own limit for a socket's path is 104 or 108

log = structlog.get_logger()


class Certificates:
    """What the server shows. It looks for a renewed certificate when somebody connects, on gRPC's own threads."""

    def __init__(
        self,
        identity: Identity,
        again: Callable[[], Identity] | None = None,
        client_ca: bytes = b"",
        *,
        look_every: float = LOOK_EVERY,
    ) -> None:
        """`again` gives the identity as it is now. With `client_ca` (PEM) only clients with a certificate of it get
        in."""
        self._shown, self._again, self._client_ca, self._look_every = identity, again, client_ca, look_every
        self._looked, self._lock = time.monotonic(), threading.Lock()
        self._trouble = ""

    @property
    def fingerprint(self) -> str:
        """Of the key that is shown, which stays the same for as long as the server runs."""
        return self._shown.fingerprint

    def credentials(self) -> grpc.ServerCredentials:
        """For one server; each has its own."""
        configured = self._shown

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal configured
            if (now := self._current()) is configured:
                return None
            configured = now
            return self._configuration(now)

        first, must = self._configuration(configured), bool(self._client_ca)
        # None is for no change, which the stubs do not know.
        return grpc.dynamic_ssl_server_credentials(first, renewed, must)  # type: ignore[arg-type]

    def _configuration(self, identity: Identity) -> grpc.ServerCertificateConfiguration:
        pair = (identity.key, identity.certificate)
        return grpc.ssl_server_certificate_configuration([pair], self._client_ca or None)

    def _current(self) -> Identity:
        with self._lock:
            if self._again is not None and time.monotonic() - self._looked >= self._look_every:
                self._looked = time.monotonic()
                self._look(self._again)
            return self._shown

    def _look(self, again: Callable[[], Identity]) -> None:
        trouble = ""
        try:
            now = again()
            if now.key != self._shown.key:
                trouble = "the key is another one, which clients would refuse; it is taken at the next start"
            elif now.certificate != self._shown.certificate:
                self._shown = now
                log.info("certificate_renewed", fingerprint=now.fingerprint)
        except (OneroundError, OSError) as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            log.error("certificate_not_renewed", reason=trouble)
        self._trouble = trouble


def socket(state: Path) -> str:
    """Where the operator's commands reach the daemon over a state folder: a socket on this machine, in that folder, or
    if its path is too long for one, in a folder that is this user's alone.

    Raises:
        NotEnough: that folder is not this user's alone.
    """
    path = state.resolve() / "admin.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET:
        return f"unix:{path}"
    folder = Path(tempfile.gettempdir()) / f"oneround-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise NotEnough(f"{folder} is not yours alone", hint="remove it, or give --state a folder with a shorter path")
    return f"unix:{folder / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.sock"
