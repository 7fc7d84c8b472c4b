import math

import pytest

from edge_client.training.recipe import SCHEDULES, Recipe
from oneround.v1 import federation_pb2 as pb


def recipe(schedule: str, warmup: float, steps: int) -> Recipe:
    train = pb.TrainSpec(learning_rate=0.5, schedule=schedule, warmup_ratio=warmup)
    return Recipe.from_spec(pb.JobSpec(train=train), steps)


def test_defaults_are_those_of_the_proto() -> None:
    spec = pb.JobSpec()
    made = Recipe.from_spec(spec, 10)
    assert (made.alpha, made.dropout, made.seed) == (spec.lora.alpha, spec.lora.dropout, spec.train.seed)
    assert (made.peak_learning_rate, made.schedule) == (spec.train.learning_rate, spec.train.schedule)
    assert made.scaling(spec.lora.rank) == spec.lora.alpha / spec.lora.rank


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
    ],
)
def test_schedules_without_warm_up(schedule: str, expected: list[float]) -> None:
    made = recipe(schedule, 0.0, 4)
    assert [made.learning_rate(step) for step in range(4)] == pytest.approx(expected)
    assert made.learning_rate(4) == pytest.approx(0.5 if schedule == "constant" else 0.0)


def test_warm_up_rises_to_the_peak_and_never_is_zero() -> None:
    made = recipe("linear", 0.3, 10)
    rates = [made.learning_rate(step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[-1] == pytest.approx(0.5 / 7)
    assert min(rates) > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_rate_lies_between_zero_and_the_peak(schedule: str, warmup: float, steps: int) -> None:
    made = recipe(schedule, warmup, steps)
    assert all(0 <= made.learning_rate(step) <= 0.5 for step in range(steps + 3))


def test_dropout_seeds_differ_by_step_and_fit_the_frameworks() -> None:
    train = pb.TrainSpec(seed=2**64 - 1)
    made = Recipe.from_spec(pb.JobSpec(train=train), 5)
    seeds = [made.dropout_seed(step) for step in range(5)]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
