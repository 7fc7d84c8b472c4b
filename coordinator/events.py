"""What happens in a round, as events: what each is called, which can happen only once, and how it reads.

An event is the wire's own message. storage/events.py keeps events in order; nothing here has an effect.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.round import PublishingFailed, Round, State, Trigger
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

KINDS = tuple(field.name for field in pb.Event.DESCRIPTOR.oneofs_by_name["what"].fields)

# What tells two events of one kind and one client apart. Where it is the same, the second one is no news: however often
# a client joins, declares an upload or reports, a job's events grow by its clients, contributions and versions alone.
_ONCE: dict[str, Callable[[pb.Event], int]] = {
    "round_opened": lambda event: 0,
    "joined": lambda event: 0,
    "first_step": lambda event: 0,
    "upload_opened": lambda event: event.upload_opened.revision,
    "contribution_received": lambda event: event.contribution_received.revision,
    "quorum_reached": lambda event: 0,
    "version_delayed": lambda event: event.version_delayed.version,
    "version_published": lambda event: event.version_published.version,
    "evaluation_reported": lambda event: event.evaluation_reported.version,
}


def kind(event: pb.Event) -> str:
    """Its kind, as the wire, the database and the metrics name it: `version_published`."""
    name = event.WhichOneof("what")
    assert name is not None, "an event says what happened"
    return str(name)


def once(event: pb.Event, client_id: str) -> str | None:
    """The same text for two events of a job of which the second one is no news; None for one that may happen again."""
    name = kind(event)
    if name == "withdrawn":  # a client without a contribution may come and go as it likes
        return None if event.withdrawn.revision else f"{name} {client_id}"
    return f"{name} {client_id} {_ONCE[name](event)}" if name in _ONCE else None


def of_transition(before: Round, trigger: Trigger, after: Round) -> list[pb.Event]:
    """What a change of a round tells, in order."""
    happened = []
    ended = after.state in (State.EXPIRED, State.CANCELLED) and after.state is not before.state
    if after.closed_at is not None and before.closed_at is None and not ended:
        happened.append(pb.Event(round_closed=pb.RoundClosed()))
    if isinstance(trigger, PublishingFailed):
        failed = pb.VersionFailed(version=before.version + 1, reason=trigger.reason)
        happened.append(pb.Event(version_failed=failed))
    elif after.state is State.PUBLISHING and before.state is not State.PUBLISHING:
        started = pb.VersionStarted(version=after.version + 1, reason=after.reason)
        happened.append(pb.Event(version_started=started))
    elif ended:
        state = pb.State.Value(f"STATE_{after.state.upper()}")
        happened.append(pb.Event(round_ended=pb.RoundEnded(state=state, reason=after.reason)))
    return happened


def sentence(event: pb.Event) -> str:
    """What happened, for people."""
    return _SENTENCES[kind(event)](event)


def _judged(event: pb.Event) -> str:
    judged = event.contribution_judged
    verdict = pb.Verdict.Name(judged.judgement.verdict).removeprefix("VERDICT_").lower()
    cohort = f" by the cohort of version {judged.version}" if judged.version else ""
    return f"contribution {verdict}{cohort}" + _because(judged.judgement.reason)


def _decided(event: pb.Event) -> str:
    decisions = {
        pb.DECISION_ADMIT: "admitted by the operator",
        pb.DECISION_EXCLUDE: "excluded by the operator",
        pb.DECISION_LET_REPLACE: "may send another contribution",
    }
    return decisions[event.decided_by_hand.decision] + _because(event.decided_by_hand.why)


def _ended(event: pb.Event) -> str:
    state = pb.State.Name(event.round_ended.state).removeprefix("STATE_").lower()
    return f"round {state}" + _because(event.round_ended.reason)


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


_SENTENCES: dict[str, Callable[[pb.Event], str]] = {
    "round_opened": lambda event: "round opened",
    "joined": lambda event: f"joined, {event.joined.machine.backend} on {event.joined.machine.device}",
    "first_step": lambda event: f"first step of {event.first_step.total_steps}",
    "upload_opened": lambda event: f"upload opened, {human_size(event.upload_opened.size)}",
    "contribution_received": lambda event: (
        f"contribution received, {human_size(event.contribution_received.size)}, "
        f"{event.contribution_received.num_examples} examples"
    ),
    "contribution_judged": _judged,
    "decided_by_hand": _decided,
    "quorum_reached": lambda event: f"quorum reached, with {event.quorum_reached.contributions} contributions",
    "round_closed": lambda event: "round closed by the operator",
    "version_started": lambda event: (
        f"version {event.version_started.version} started{_because(event.version_started.reason)}"
    ),
    "version_delayed": lambda event: (
        f"version {event.version_delayed.version} waits{_because(event.version_delayed.reason)}"
    ),
    "version_published": lambda event: (
        f"version {event.version_published.version} published, of {event.version_published.contributions} contributions"
    ),
    "version_failed": lambda event: (
        f"version {event.version_failed.version} failed{_because(event.version_failed.reason)}"
    ),
    "round_ended": _ended,
    "withdrawn": lambda event: "withdrew" + (", with its contribution" if event.withdrawn.revision else ""),
    "evaluation_reported": lambda event: f"reported an evaluation of version {event.evaluation_reported.version}",
}
