"""The real daemon in a process that kills itself, with SIGKILL, at one of its durable steps.

A step is whatever changes what a restart finds: a file opened for writing, written to, synced, linked, renamed or
removed under the state folder, and a commit of a transaction that writes. Each has a name, `link blobs/<digest>` or
`commit contribute`, in which what differs from run to run is left out. Steps are counted over the daemon and its
publisher together; when the publisher's turn comes to die it takes the daemon with it.

`python -m tests.coordinator.dying` loads the daemon's code once and forks a `coordinator serve` for every line that it
reads, since a sweep starts hundreds of them.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import json
import os
import re
import select
import shutil  # noqa: F401  before anything is wrapped: it asks once whether os.unlink takes folders' descriptors
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLAN = "ONEROUND_TEST_DYING"  # how the plan reaches the publisher


@dataclass(frozen=True)
class Plan:
    """Over which state folder a daemon runs, and where it dies."""

    state: str
    steps: str  # a file outside the state folder: one line for every step that began
    name: str = ""  # of the step; empty: none
    at: int = 1  # the first of this name, the second, …
    after: bool = False  # die when the step is done, rather than before it


class _Steps:
    """Counts the steps of this process and its relatives, and dies when it is time."""

    def __init__(self, plan: Plan, *, publisher: bool) -> None:
        self._plan = plan
        self._publisher = publisher
        self._lock = threading.Lock()
        self._inside = threading.local()  # an open within an open is one step

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if getattr(self._inside, "now", False):
            yield
            return
        mine = self._begin(name) == self._plan.at and name == self._plan.name
        if mine and not self._plan.after:
            self._die()
        self._inside.now = True
        try:
            yield
        finally:
            self._inside.now = False
            if mine:
                self._die()

    def _begin(self, name: str) -> int:
        """Write the step down; returns how many of this name there are with it."""
        with self._lock:
            handle = _open(self._plan.steps, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(handle, f"{name}\n".encode())
                return os.pread(handle, 1 << 24, 0).decode().splitlines().count(name)
            finally:
                os.close(handle)

    def _die(self) -> None:
        if self._publisher:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def named(self, path: Any, folder: int | None = None) -> str | None:
        """A path's name in steps; None where it is not in the state folder."""
        if isinstance(path, int):
            whole = _readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            whole = str(Path(_readlink(f"/proc/self/fd/{folder}")) / os.fsdecode(path))
        else:
            whole = str(Path(os.fsdecode(path)).absolute())
        inside = whole.removeprefix(self._plan.state).removeprefix("/")
        if not whole.startswith(self._plan.state):
            return None
        inside = re.sub(r"[0-9a-f]{64}", "<digest>", inside)
        inside = re.sub(r"[0-9a-f]{32}", "<client>", inside)
        return re.sub(r"v\d+(?=[./]|$)", "v<n>", inside) or "."


_open, _readlink = os.open, os.readlink


def arm(plan: Plan, *, publisher: bool) -> None:
    """From here on this process counts its steps, and may die."""
    steps = _Steps(plan, publisher=publisher)

    def wrap(owner: Any, attribute: str, verb: str) -> None:
        original = getattr(owner, attribute)

        def stepped(path: Any, *rest: Any, **options: Any) -> Any:
            named = steps.named(rest[0] if verb in ("link", "rename") else path, options.get("dir_fd"))
            if named is None or (verb == "mkdir" and Path(path).exists()):
                return original(path, *rest, **options)
            with steps.step(f"{verb} {named}"):
                return original(path, *rest, **options)

        setattr(owner, attribute, stepped)

    for attribute, verb in [
        ("fsync", "fsync"),
        ("replace", "rename"),  # named by where it leads
        ("rename", "rename"),
        ("link", "link"),
        ("unlink", "unlink"),
        ("remove", "unlink"),
        ("rmdir", "rmdir"),  # with unlink and rmdir all of shutil.rmtree is counted, file for file
        ("mkdir", "mkdir"),
    ]:
        wrap(os, attribute, verb)
    _wrap_opens(steps)
    if not publisher:
        _wrap_commits(steps)
        _wrap_writes(steps)
        os.environ[PLAN] = json.dumps(asdict(plan))


def _wrap_opens(steps: _Steps) -> None:
    buffered = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        named = steps.named(file) if set(mode) & set("wax+") and not isinstance(file, int) else None
        if named is None:
            return buffered(file, mode, *rest, **options)
        with steps.step(f"open {named}"):
            return buffered(file, mode, *rest, **options)

    def handle(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        named = steps.named(path, options.get("dir_fd")) if writes else None
        if named is None:
            return _open(path, flags, *rest, **options)
        with steps.step(f"open {named}"):
            return _open(path, flags, *rest, **options)

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.open = handle  # type: ignore[assignment]


def _wrap_commits(steps: _Steps) -> None:
    """A commit is named by the method of the store, or of people.py, that wants it."""
    from sqlalchemy.engine.base import Connection

    original = Connection._commit_impl

    def commit(self: Connection) -> None:
        if not self.get_execution_options().get("writes"):
            original(self)
            return
        with steps.step(f"commit {_caller('store.py', 'people.py')}"):
            original(self)

    Connection._commit_impl = commit  # type: ignore[method-assign]


def _wrap_writes(steps: _Steps) -> None:
    """Uploads grow by writes that nothing syncs until the end; a death between two leaves a part."""
    from oneround import stream

    original: Callable[..., None] = stream.Sink.write

    def write(self: stream.Sink, pieces: Any) -> None:
        with steps.step(f"write {steps.named(self._file.fileno())}"):
            original(self, pieces)

    stream.Sink.write = write  # type: ignore[method-assign]


def _caller(*files: str) -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code.co_filename.endswith(files) and not frame.f_code.co_name.startswith(("_writes", "_readable")):
            return frame.f_code.co_name.replace("__init__", "upgrade")
        frame = frame.f_back
    return "?"


def arm_publisher() -> None:
    """Called in a publisher before anything of its own."""
    arm(Plan(**json.loads(os.environ[PLAN])), publisher=True)


# ---- the process that forks daemons ----

# What `sitecustomize` holds on the path of the daemon's children; Python imports it as it starts.
HOOK = f"""
import os, sys
if "coordinator.publication.build" in sys.orig_argv and {PLAN!r} in os.environ:
    from tests.coordinator import dying
    dying.arm_publisher()
"""


def serve_all() -> None:
    """Lines in: a plan each. Lines out: `{"pid": …}` for each, and `{"pid": …, "code": …}` when one has ended."""
    import coordinator.cli.app  # noqa: F401  what every fork begins with

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    alive: set[int] = set()
    pending = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(alive):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    alive.discard(pid)
                    _say(pid=pid, code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                plan = Plan(**json.loads(line))
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    _become(plan)
                alive.add(pid)
                _say(pid=pid)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def _say(**what: int) -> None:
    print(json.dumps(what), flush=True)


def _become(plan: Plan) -> None:
    """The fork turns into `coordinator serve`."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(f"{plan.state}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    code = 1
    try:
        from coordinator.cli import app

        arm(plan, publisher=False)
        app.app(["serve", "--listen", "127.0.0.1:0", "--state", plan.state], standalone_mode=False)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve_all()
