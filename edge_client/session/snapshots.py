"""When a snapshot of training is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence

from edge_client.backends import Progress
from edge_client.outbox import Outbox
from edge_client.training import snapshot
from edge_client.training.snapshot import Snapshot
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.errors import NotEnough

SAVE_SECONDS = 30.0  # between two snapshots
SAVING_SHARE = 0.05  # of the time, at most, goes into keeping them


class SnapshotSchedule:
    """Keeps how training stands every so many seconds, and less often where that takes long."""

    def __init__(self, box: Outbox, run: str, every: float, screen: Screen) -> None:
        self._box, self._run, self._every, self._screen = box, run, every, screen
        self._next = time.monotonic() + every
        self._failed = False

    def after(self, losses: Sequence[float], progress: Progress, *, now: bool) -> None:
        """A step is done; `now`: training ends or pauses here. A full disk is told once, and no reason to end."""
        if not now and time.monotonic() < self._next:
            return
        began = time.monotonic()
        try:
            snapshot.write(self._box.snapshot, Snapshot(tuple(losses), progress.arrays(), progress.setup), self._run)
            self._failed = False
        except (OSError, NotEnough) as error:
            if not self._failed:
                self._screen.say(events.SnapshotFailed(why=str(error)))
            self._failed = True
        ended = time.monotonic()
        self._next = ended + max(self._every, (ended - began) / SAVING_SHARE)
