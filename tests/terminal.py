"""A command in a terminal of its own, read and typed into as a person would."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests import commands
from tests.waiting import LONG

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


class Terminal:
    """`text` is all that was printed so far, without colours and movements."""

    def __init__(self, process: subprocess.Popen[bytes], handle: int) -> None:
        self.process = process
        self._handle = handle
        self._printed = b""

    @property
    def text(self) -> str:
        return _CONTROL.sub("", self._printed.decode(errors="replace")).replace("\r\n", "\n")

    def expect(self, words: str, seconds: float = LONG) -> None:
        """Wait until these words are there."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline and self._more(), f"{words!r} is not in:\n{self.text}"

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def finish(self, *, code: int) -> str:
        """Wait for the end, hold the command to its exit code, and return all that it printed."""
        while self._more():
            pass
        assert self.process.wait(timeout=LONG) == code, self.text
        assert "Traceback" not in self.text
        return self.text

    def _more(self) -> bool:
        """Read on; False at the end."""
        if not select.select([self._handle], [], [], 1.0)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self._handle, 65536)
        except OSError:  # what Linux says when nobody has the terminal any more
            return False
        self._printed += data
        return bool(data)


@contextmanager
def running(
    name: str, *arguments: object, columns: int = 100, env: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """A command of ours, or the program of this path, in a terminal of so many columns; `env` over our own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
    environment.pop("COLUMNS", None)
    program = name if "/" in name else str(commands.BIN / name)
    process = subprocess.Popen(
        [program, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        preexec_fn=_take_the_terminal,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def _take_the_terminal() -> None:
    """In the child: a session of its own, so that Ctrl-C reaches it and nobody else."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
