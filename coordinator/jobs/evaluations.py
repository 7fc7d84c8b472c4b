"""Did it help, and whom: what clients report of a publication, held against what can be, and put together."""

from __future__ import annotations

import math
from collections.abc import Iterable

from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb

MOST_LOSS = 1000.0  # nats per token; guessing among a million tokens costs 14
MOST_TOKENS = 10**12


def check(evaluation: pb.Evaluation) -> None:
    """Hold a report from the wire against what it may say; it is shown in tables and goes into means.

    Raises:
        UsageError: a number is missing, or cannot be.
    """
    present = {field.name for field, _ in evaluation.ListFields()}
    missing = [field.name for field in pb.Evaluation.DESCRIPTOR.fields if field.name not in present]
    if missing:
        raise UsageError(f"an evaluation without {', '.join(missing)}")
    losses = (evaluation.base_loss, evaluation.own_loss, evaluation.published_loss)
    if not all(math.isfinite(loss) and 0 <= loss <= MOST_LOSS for loss in losses):
        raise UsageError(f"an evaluation with a loss that cannot be: it is between 0 and {MOST_LOSS:g} nats per token")
    if not 1 <= evaluation.tokens <= MOST_TOKENS:
        raise UsageError("an evaluation over a number of tokens that cannot be")


def compare(clients: Iterable[pb.ClientStatus]) -> list[pb.Comparison]:
    """What the reports of each version come to, oldest version first; the plain mean over those who reported it."""
    by_version: dict[int, list[pb.Evaluation]] = {}
    for client in clients:
        for evaluation in client.evaluations:
            by_version.setdefault(evaluation.version, []).append(evaluation)
    return [
        pb.Comparison(
            version=version,
            clients=len(reported),
            better_than_base=sum(report.published_loss < report.base_loss for report in reported),
            better_than_own=sum(report.published_loss < report.own_loss for report in reported),
            base_loss=math.fsum(report.base_loss for report in reported) / len(reported),
            own_loss=math.fsum(report.own_loss for report in reported) / len(reported),
            published_loss=math.fsum(report.published_loss for report in reported) / len(reported),
        )
        for version, reported in sorted(by_version.items())
    ]
