"""A client that watches for jobs, in this process, and what it says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.connection.remote import Remote
from edge_client.ui.screen import Screen
from edge_client.unattended.watch import JobWatcher
from tests.fakes import FakeBackend
from tests.participants import participant
from tests.waiting import LONG


class Listening:
    """What a staying client says, and waiting for it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.said: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        """What was said since the last look."""
        lines = self._capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def until(self, event: str, **fields: object) -> None:
        end = time.monotonic() + LONG
        while True:
            self.said += self.lines()
            if any(line["event"] == event and fields.items() <= line.items() for line in self.said):
                return
            assert time.monotonic() < end, f"nothing was said of {event}: {self.said}"
            await asyncio.sleep(0.05)


def quick_stay(
    address: str,
    folder: Path,
    backend: FakeBackend,
    connect: Callable[[], AbstractAsyncContextManager[Remote]] | None = None,
    rows: int = 30,
) -> JobWatcher:
    who = participant(folder, backend, rows)
    there = connect or (lambda: remotes.connect(address, Pins(who.state), lambda *_: None))
    return JobWatcher(there, ["ward-*"], who, Screen(as_json=True), look_seconds=0.1, first_pause=0.1)


@asynccontextmanager
async def at_work(staying: JobWatcher) -> AsyncIterator[None]:
    task = asyncio.create_task(staying.stay())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
