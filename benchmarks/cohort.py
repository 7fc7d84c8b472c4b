"""A coordinator and clients as real processes of our own commands, with everybody's progress on one board."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from edge_client.ui.screen import columns_of_a_bar


@contextmanager
def coordinator(out: Path) -> Iterator[str]:
    """A daemon on a free port of 127.0.0.1; gives its address, and stops it in the end."""
    log = (out / "coordinator.log").open("w")
    command = [tool("coordinator"), "serve", "--listen", "127.0.0.1:0", "--state", str(out / "coordinator")]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    announced = out / "coordinator" / "daemon.json"
    try:
        while not announced.exists():
            if process.poll() is not None:
                sys.exit(f"the coordinator did not start; see {log.name}")
            time.sleep(0.05)
        yield json.loads(announced.read_text())["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


class Client:
    """One `edge-client join`, its progress on the board, and what it said last of each kind."""

    def __init__(
        self,
        name: str,
        *,
        server: str,
        job: str,
        backend: str,
        data: Path,
        out: Path,
        threads: int,
        board: Board,
        model: Path | None = None,
    ) -> None:
        """`model`: the base, where it is on the client's machine; otherwise the coordinator sends it."""
        self.name, self.backend = name, backend
        self.said: dict[str, dict[str, Any]] = {}
        self.log = out / f"client-{name}.log"
        self._board = board
        self._row = board.add(f"{name} ({backend})")
        command = [tool("edge-client"), "join", "--server", server, "--job", job, "--data", str(data), "--name", name]
        command += ["--backend", backend, "--state", str(out / "clients" / name), "--json", "--wait", "--yes"]
        if model is not None:
            command += ["--model", str(model)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None, "asked for above"
        for line in self.process.stdout:
            said = json.loads(line)
            self.said[said["event"]] = said
            if said["event"] == "progress":
                detail = f"loss {said['loss']:.3f}" if "loss" in said else ""
                self._board.update(self._row, said["what"], said["done"], said["total"], detail)
            elif said["event"] == "receipt":
                self._board.update(self._row, "receipt", 1, 1, f"{said['size']:,} bytes sent")
            elif said["event"] == "waiting" and said["state"] == "publishing":
                self._board.update(self._row, "publishing", 1, 1, "the coordinator merges and verifies")
            elif said["event"] == "published":
                self._board.update(self._row, "done", 1, 1, f"v{said['version']} is there")


def wait_for(clients: list[Client]) -> None:
    """Until all have seen the publication; if one fails, the others have nothing to wait for."""
    pending = list(clients)
    try:
        while pending:
            for client in tuple(pending):
                code = client.process.poll()
                if code:
                    sys.exit(f"client {client.name} failed:\n{client.log.read_text()}")
                if code == 0:
                    client.reader.join()
                    pending.remove(client)
            time.sleep(0.1)
    finally:
        for client in clients:
            if client.process.poll() is None:
                client.process.terminate()


class Board:
    """Progress bars in a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("  {task.description:<18}"),
            TextColumn("{task.fields[what]:<10}"),
            *columns_of_a_bar(),
        )
        self._progress = Progress(*columns, console=console) if console.is_terminal else None
        self._names: list[str] = []
        self._printed: dict[int, tuple[float, str]] = {}

    def __enter__(self) -> Board:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def add(self, name: str) -> int:
        self._names.append(name)
        if self._progress:
            return self._progress.add_task(name, what="starting", detail="", total=None)
        return len(self._names) - 1

    def update(self, row: int, what: str, done: int, total: int, detail: str) -> None:
        if self._progress:
            self._progress.update(TaskID(row), what=what, completed=done, total=total, detail=detail)
            return
        last, last_what = self._printed.get(row, (0.0, ""))
        if what != last_what or time.monotonic() - last > 10:
            self._printed[row] = (time.monotonic(), what)
            self._console.print(f"  {self._names[row]:<18} {what:<10} {done}/{total} {detail}")


def run(name: str, *arguments: object) -> str:
    """Run one of our commands; its output, or the end of the demo with what it said."""
    done = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} {' '.join(map(str, arguments))} failed with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)
