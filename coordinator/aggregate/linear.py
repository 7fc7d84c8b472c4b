"""Which jobs' results follow from sums alone, so that nobody has to see what a single client sent."""

from __future__ import annotations

from converters.updates.kinds import kind_of
from coordinator.aggregate import METHODS
from oneround.v1 import federation_pb2 as pb


def is_linear(spec: pb.JobSpec) -> bool:
    """Whether a job's result follows from sums of what its clients send, weighted by their counts: what secure
    aggregation can give.

    Sums of two trained factors tell `fedavg` all it needs, and `exact` nothing; where A is frozen, or ΔW itself is
    sent, they tell every mean. The server learning rate and a truncation to `publish.adapter_rank` come after the sum.
    """
    linear_in = METHODS[spec.aggregate.method].linear_in
    return linear_in == "tensors" or (linear_in == "updates" and kind_of(spec).is_linear(spec))
