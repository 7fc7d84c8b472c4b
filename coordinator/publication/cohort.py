"""The contributions of a version compared with each other: who takes part, and with what update.

A candidate is read, becomes a member of the cohort, is assessed there, and ends as an entry of the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converters.adapter import Adapter
from converters.updates import kinds
from converters.updates.low_rank import LowRank
from coordinator import aggregate
from coordinator.admission import outliers
from coordinator.admission.outliers import Assessment, Member
from coordinator.aggregate import ClientUpdate, changes, clipped
from coordinator.publication.order import BuildOrder, Candidate
from oneround import stream
from oneround.errors import BadModel
from oneround.manifest import ContributionEntry


def start(order: BuildOrder, scratch: Path) -> Adapter | None:
    """What every contribution holds, in a job that starts from an earlier adapter; kept in the folder `scratch`.

    Rounded as contributions are, so that what a client left as it was is no change.
    """
    if not kinds.settings(order.spec).start_from:
        return None
    assert order.initial, "a job that starts from an adapter has it"
    kind = kinds.kind_of(order.spec)
    file, whole = scratch / "start.safetensors", kind.read(order.initial)
    initial = stream.digest(order.initial) if kind.is_partial(order.spec) else ""
    kind.write(whole, file, order.spec.upload.dtype, initial)
    return kind.read(file, whole)


def read(order: BuildOrder) -> dict[str, Adapter]:
    """What each candidate sent, by its id; factors stay on disk until they are used."""
    kind, frozen = kinds.kind_of(order.spec), kinds.frozen(order.spec, order.initial)
    return {candidate.id: kind.read(candidate.file, frozen) for candidate in order.contributions}


def assess(order: BuildOrder, sent: Mapping[str, Adapter], start: Adapter | None) -> dict[str, Assessment]:
    """What the cohort makes of each candidate, by its id; with a `start`, of what each changed of it."""
    arrived = sorted(order.contributions, key=lambda candidate: (candidate.received, candidate.id))
    members = [
        Member(
            candidate.id,
            candidate.client,
            changes(sent[candidate.id], start),
            candidate.num_examples,
            candidate.by_hand,
        )
        for candidate in arrived
    ]
    assessments = outliers.judge(members, order.spec.admission)
    if len(members) < outliers.COHORT:
        assessments = [_upheld(*pair) for pair in zip(arrived, assessments, strict=True)]
    return {member.id: assessment for member, assessment in zip(members, assessments, strict=True)}


def _upheld(candidate: Candidate, assessment: Assessment) -> Assessment:
    """In a cohort that is too small to tell, what a larger one found holds."""
    if not candidate.earlier or candidate.by_hand or assessment.verdict == "quarantined":
        return assessment
    return replace(assessment, verdict="quarantined", reason=candidate.earlier)


def taking_part(order: BuildOrder, assessments: Mapping[str, Assessment]) -> list[Candidate]:
    """The candidates that are averaged, in the order of the contributions.

    Raises:
        BadModel: fewer are left than the version needs.
    """
    taking = [candidate for candidate in order.contributions if assessments[candidate.id].verdict != "quarantined"]
    if len(taking) < order.at_least:
        left_out = [candidate for candidate in order.contributions if candidate not in taking]
        reasons = "; ".join(f"{candidate.client}: {assessments[candidate.id].reason}" for candidate in left_out)
        raise BadModel(
            f"only {len(taking)} contributions are left, and at least {order.at_least} are needed: {reasons}"
        )
    return taking


def updates(
    order: BuildOrder,
    taking: Sequence[Candidate],
    sent: Mapping[str, Adapter],
    assessments: Mapping[str, Assessment],
    start: Adapter | None,
) -> list[ClientUpdate[LowRank]]:
    """What is averaged: the updates of those who take part, scaled down where they were clipped."""
    kind, method = kinds.kind_of(order.spec), aggregate.METHODS[order.spec.aggregate.method]
    by_factor = kind.is_partial(order.spec) or method.needs_one_rank
    return [
        ClientUpdate(
            clipped(sent[candidate.id], assessments[candidate.id].scale, start, by_factor=by_factor),
            candidate.num_examples,
        )
        for candidate in taking
    ]


def entry(candidate: Candidate, assessment: Assessment, weight: float) -> ContributionEntry:
    """A candidate as the manifest lists it, with how much it counts."""
    finite = math.isfinite(assessment.norm)  # it is not, of one with NaN that the operator admitted
    return ContributionEntry(
        client=candidate.client,
        id=candidate.id,
        digest=candidate.digest,
        num_examples=candidate.num_examples,
        weight=weight,
        verdict=assessment.verdict,
        reason=assessment.reason,
        norm=assessment.norm if finite else None,
        cosine=assessment.cosine,
    )
