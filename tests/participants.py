"""A whole client, with data of its own and a backend that does not really train."""

from __future__ import annotations

import json
from pathlib import Path

from edge_client import session
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.ui.screen import Screen
from oneround.v1 import federation_pb2 as pb
from tests.fakes import FakeBackend, fail_first_upload


def participant(tmp_path: Path, backend: FakeBackend, rows: int = 30) -> session.Participant:
    """Alice, with so many rows of text."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "row {n} of the data"}}\n' for n in range(rows)))
    state = tmp_path / "client"
    state.mkdir(exist_ok=True)
    return session.Participant(state=state, name="alice", data=data, backend=backend)


async def take_part(
    address: str, who: session.Participant, error: Exception | None = None, screen: Screen | None = None
) -> pb.Receipt:
    """Take part in the job `notes` over a new connection, whose first upload may meet an error."""
    async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
        if error is not None:
            fail_first_upload(remote, error)
        return await session.take_part(remote, "notes", who, screen or Screen())


async def contributed(address: str, folder: Path) -> session.Participant:
    """One client that has taken part, with the daemon at an address, and changed little."""
    who = participant(folder, FakeBackend(b=0.5))
    who.data.write_text("".join(json.dumps({"text": f"def f{n}(self):\n    return {n}\n"}) + "\n" for n in range(60)))
    await take_part(address, who)
    return who
