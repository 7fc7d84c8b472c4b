"""Starting the making of versions at the wrong moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from coordinator.publication.scheduler import PublicationScheduler


class Published:
    """A store in which the job's version was recorded a moment ago, so that none is being made."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def in_making(self, job: str) -> None:
        self.asked.append(job)


async def test_a_start_that_comes_after_the_version_was_recorded_is_no_failure(tmp_path: Path) -> None:
    store = Published()
    told: list[str] = []

    async def published(name: str, round: object) -> None:
        told.append(f"published {name}")

    async def failed(name: str, reason: str) -> None:
        told.append(f"failed {name}: {reason}")

    nothing = cast(Any, None)
    scheduler = PublicationScheduler(tmp_path, cast(Any, store), nothing, nothing, nothing, lambda: 0.0)
    scheduler.start("notes", published, failed)
    (task,) = scheduler._tasks.values()
    await task
    assert store.asked == ["notes"] and told == []
    assert not list(tmp_path.iterdir())
