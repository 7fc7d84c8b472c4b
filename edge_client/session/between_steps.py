"""What happens between two steps of training: it is shown, kept, and paused or stopped."""

from __future__ import annotations

from edge_client.backends import Progress, Setup
from edge_client.pausing.controller import PauseController
from edge_client.session.heartbeat import Heartbeat
from edge_client.session.snapshots import SnapshotSchedule
from edge_client.ui import events
from edge_client.ui.screen import Advance, Screen


class BetweenSteps:
    """Called by a backend after every step, in the training thread."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        pausing: PauseController,
        schedule: SnapshotSchedule,
        screen: Screen,
        advance: Advance,
        setup: Setup,
        losses: list[float],
    ) -> None:
        """`losses` are those of the steps that are done already; every step adds its own. `setup` is that of the first
        step to come."""
        self._heartbeat, self._pausing, self._schedule = heartbeat, pausing, schedule
        self._screen, self._advance = screen, advance
        self._setup, self._losses = setup, losses

    def __call__(self, progress: Progress) -> None:
        """Raises Refused when training is to stop."""
        self._losses.append(progress.loss)
        self._tell(progress)
        pauses = self._pausing.pauses and progress.step < progress.total_steps
        self._schedule.after(self._losses, progress, now=pauses or bool(self._heartbeat.stop))
        if pauses:
            self._heartbeat.now.tokens_per_second = 0.0
            self._pausing.wait(lambda: self._heartbeat.stop)
        self._heartbeat.check()

    def _tell(self, progress: Progress) -> None:
        if progress.setup != self._setup:
            self._setup = progress.setup
            self._screen.say(
                events.BatchHalved(
                    step=progress.step, parts=progress.setup.parts, checkpointing=progress.setup.checkpointing
                )
            )
        speed = progress.tokens / max(progress.seconds, 1e-9)
        beat = self._heartbeat.now
        beat.step, beat.loss, beat.tokens_per_second = progress.step, progress.loss, speed
        self._advance(
            progress.step,
            f"loss {progress.loss:.3f}, {speed:.0f} tokens/s",
            loss=progress.loss,
            tokens_per_second=speed,
        )
