"""What goes into the simulation, held against what the product itself makes of the demo's base; and its table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from converters import adapter, architectures

ROOT = Path(__file__).parents[2] / "benchmarks"
BASE = ROOT / "base"


@pytest.fixture
def time_to_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as it is run: its neighbours are on the path."""
    monkeypatch.syspath_prepend(str(ROOT))
    import time_to_model

    return time_to_model


@pytest.fixture
def round_costs(time_to_model: ModuleType) -> ModuleType:
    """What it takes its inputs from."""
    import round_costs

    return round_costs


@pytest.fixture
def wire() -> dict[str, object]:
    """What wire_cost.py writes, with round figures."""
    arm = {"adapter_bytes": 1000, "initial_bytes": 2000, "other_up": 30, "other_down": 60, "publish_seconds": 5.0}
    arm |= {"up_per_client": 1030, "down_per_client": 2060}
    large = {**arm, "adapter_bytes": 2000, "initial_bytes": 4000, "other_up": 40, "other_down": 80}
    hourly = {target: {"up": 3600, "down": 360} for target in ("training", "waiting")}
    return {"bases": {"small": {"exact": arm}, "base": {"exact": large}}, "by_hour": {**hourly, "step_seconds": 0.5}}


def test_an_adapter_of_a_shape_fits_a_base_of_that_shape(round_costs: ModuleType, tmp_path: Path) -> None:
    shape = json.loads((BASE / "config.json").read_text())
    described = architectures.describe(BASE)
    assert round_costs.linears(shape) == described.linears
    adapter.write(adapter.initial(described.linears, 16, seed=0), tmp_path / "initial.safetensors")
    assert round_costs.adapter_bytes(shape, "float32") == (tmp_path / "initial.safetensors").stat().st_size


def test_what_is_sent_besides_a_file_lies_on_a_line(round_costs: ModuleType, wire: dict[str, object]) -> None:
    assert round_costs.other(wire, "up", 11_000) == pytest.approx(20 + 0.01 * 11_000)
    assert round_costs.other(wire, "down", 0) == pytest.approx(40)


@pytest.mark.parametrize(("load", "in_peace"), [(2.1, True), (3.0, True), (3.1, False), (13.0, False)])
def test_seconds_of_a_busy_machine_are_not_taken(round_costs: ModuleType, load: float, in_peace: bool) -> None:
    wire = {"machine": {"cores": 2}, "by_hour": {"load": load}}
    assert round_costs.measured_in_peace(wire) is in_peace


def test_all_arms_train_equally_much(time_to_model: ModuleType, wire: dict[str, object]) -> None:
    model = time_to_model.demo_model(wire)
    for rounds in time_to_model.ROUNDS:
        planned = time_to_model.plan(model, rounds, time_to_model.CLOSING["all ten"])
        assert planned.rounds * planned.steps == time_to_model.STEPS
    assert time_to_model.one_device(model) == pytest.approx((10 * 300 * 0.5 + 5) / 3600)


def test_the_table_has_every_model_and_profile(time_to_model: ModuleType, wire: dict[str, object]) -> None:
    document = time_to_model.run({"5M": time_to_model.demo_model(wire)}, wire["by_hour"], seeds=3)
    json.dumps(document, allow_nan=False)
    found = document["results"]["5M"]["profiles"]
    in_one = found["datacenter"]["all ten"]["1"]
    # 300 steps of half a second on devices 5 % apart, and 5 s to publish; the slowest of ten decides
    assert 155 < in_one["hours"]["median"] * 3600 < 190
    assert in_one["contributions"] == 10 and in_one["with_model"] == 1
    for closing in time_to_model.SHOWN:
        many = found["laptops"][closing]["10"]["bytes"]
        assert many["up"] > 10 * 1030
    table = time_to_model.table(document)
    rows = [line.split("|") for line in table.splitlines() if line]
    assert sum(row[1].strip() == "5M, laptops" for row in rows) == len(time_to_model.SHOWN) + 1
    assert {len(row) for row in rows} == {4 + 1 + len(time_to_model.ROUNDS), 3 + 5}


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0, "0 s"), (5 / 3600, "5.0 s"), (0.02, "72 s"), (1, "60 min"), (2, "2.0 h"), (47, "47.0 h"), (72, "3.0 d")],
)
def test_times_are_said_as_people_say_them(time_to_model: ModuleType, hours: float, said: str) -> None:
    assert time_to_model.time(hours) == said


def test_a_plan_that_never_came_to_a_model_says_never(time_to_model: ModuleType) -> None:
    assert time_to_model.cell({"with_model": 0.0}) == "never"
    some = {"with_model": 0.5, "hours": {"median": 2, "p10": 1, "p90": 3}}
    assert time_to_model.cell(some) == "2.0 h (60 min–3.0 h, 50% of runs)"
