"""When training may use this machine, and when it waits. Decisions only: sensors.py reads how things stand, and
controller.py keeps to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

MORE_BATTERY = 5.0  # percent above the least at which training goes on
MORE_MEMORY = 3.0
IDLE_SECONDS = 300.0  # without a key or a click: nobody is at the machine


class When(StrEnum):
    """When a person lets training use the machine; several hold together."""

    ALWAYS = "always"
    PLUGGED_IN = "plugged-in"
    IDLE = "idle"


class Heat(IntEnum):
    """How near the machine is to slowing down by itself."""

    COOL = 0
    WARM = 1  # no reason to pause, and too warm to go on after a pause
    HOT = 2


@dataclass(frozen=True)
class PausePolicy:
    """What a person asks of training. Percentages of 0 switch a limit off."""

    plugged_in: bool = False
    idle: bool = False
    min_battery: float = 30.0  # percent; below it, on battery, training pauses
    min_memory: float = 5.0  # percent of the machine's memory that is left to other programs
    settle: float = 30.0  # seconds without a reason before training goes on


@dataclass(frozen=True)
class Readings:
    """What the machine says of itself."""

    battery: float | None = None  # percent; None: there is none
    on_battery: bool = False
    heat: Heat = Heat.COOL  # also where it cannot be told
    memory: float = 100.0  # percent that programs can have before anything is swapped out
    memory_short: bool = False  # the system itself says so
    idle: float | None = None  # seconds since somebody last used it; None: it cannot be told


@dataclass(frozen=True)
class Reason:
    """Why training pauses and when it goes on, each the end of a sentence."""

    kind: str
    why: str
    until: str


@dataclass(frozen=True)
class Pause:
    """A pause, and when (in seconds of the clock that `decide` is given) there was last a reason for it."""

    reason: Reason
    seen: float


def decide(readings: Readings, manners: PausePolicy, pause: Pause | None, now: float) -> Pause | None:
    """Whether training pauses from here on. It begins at once, and ends when there was no reason for a while: what it
    takes to go on is more than what it takes to pause, so that the two do not take turns."""
    reason = why_pause(readings, manners, paused_for=pause.reason.kind if pause else "")
    if reason is not None:
        return Pause(reason, now)
    if pause is not None and now - pause.seen < manners.settle:
        return pause
    return None


def why_pause(readings: Readings, manners: PausePolicy, *, paused_for: str = "") -> Reason | None:
    """The first reason against training now; `paused_for` is the kind of the one that it pauses for already."""
    for check in (_power, _battery, _person, _heat, _memory):
        reason = check(readings, manners, paused_for)
        if reason is not None:
            return reason
    return None


def _power(readings: Readings, manners: PausePolicy, paused_for: str) -> Reason | None:
    if manners.plugged_in and readings.on_battery:
        return Reason("unplugged", "this machine runs on its battery", "when it is plugged in")
    return None


def _battery(readings: Readings, manners: PausePolicy, paused_for: str) -> Reason | None:
    enough = manners.min_battery + (MORE_BATTERY if paused_for == "battery" else 0.0)
    if not manners.min_battery or not readings.on_battery or readings.battery is None or readings.battery >= enough:
        return None
    return Reason(
        "battery",
        f"the battery is at {readings.battery:.0f} %",
        f"when the machine is plugged in, or at {manners.min_battery + MORE_BATTERY:.0f} %",
    )


def _person(readings: Readings, manners: PausePolicy, paused_for: str) -> Reason | None:
    if not manners.idle or (readings.idle is not None and readings.idle >= IDLE_SECONDS):
        return None
    explanation = (
        "somebody uses this machine" if readings.idle is not None else "it cannot be told whether this machine is idle"
    )
    return Reason("in_use", explanation, f"when nobody has used it for {IDLE_SECONDS / 60:.0f} minutes")


def _heat(readings: Readings, manners: PausePolicy, paused_for: str) -> Reason | None:
    too_warm = Heat.WARM if paused_for == "heat" else Heat.HOT
    if readings.heat >= too_warm:
        return Reason("heat", "this machine is hot", "when it has cooled down")
    return None


def _memory(readings: Readings, manners: PausePolicy, paused_for: str) -> Reason | None:
    enough = manners.min_memory + (MORE_MEMORY if paused_for == "memory" else 0.0)
    if not manners.min_memory or (readings.memory >= enough and not readings.memory_short):
        return None
    return Reason(
        "memory",
        f"other programs have only {readings.memory:.0f} % of the memory left",
        f"when they have {manners.min_memory + MORE_MEMORY:.0f} %",
    )
