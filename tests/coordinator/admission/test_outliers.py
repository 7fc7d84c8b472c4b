"""What contributions are compared by, against dense NumPy, and who is caught in cohorts as this product has them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import adapter
from converters.adapter import Adapter, LowRank, Shape
from coordinator.admission import outliers
from coordinator.admission.outliers import Assessment, Member, judge
from coordinator.aggregate import gram
from coordinator.aggregate.gram import inner
from oneround.v1 import federation_pb2 as pb
from tests.coordinator.cohorts import SHAPES, dense, honest, member

RULES = pb.AdmissionSpec()
ANY = pb.AdmissionSpec(outlier=0, clip=0, min_cosine=-1)
SEEDS = st.integers(0, 2**31)


def times(update: Adapter, factor: float, only: str = "") -> Adapter:
    return Adapter(
        {
            name: LowRank(one.a, one.b * np.float32(factor)) if only in ("", name) else one
            for name, one in update.modules.items()
        }
    )


def noise(update: Adapter, seed: int) -> Adapter:
    """Random B of the same norms over the same A."""
    rng, modules = np.random.default_rng(seed), {}
    for name, one in update.modules.items():
        b = rng.standard_normal(one.b.shape).astype(np.float32)
        b *= np.linalg.norm(one.delta()) / np.linalg.norm(b @ one.a)
        modules[name] = LowRank(one.a, b)
    return Adapter(modules)


def put(members: Sequence[Member], n: int, update: Adapter, *, by_hand: bool = False) -> list[Member]:
    return [*members[:n], member(n, update, by_hand=by_hand), *members[n + 1 :]]


def verdicts(findings: Sequence[Assessment]) -> list[str]:
    return [finding.verdict for finding in findings]


def low_rank(rng: np.random.Generator, shape: Shape, ranks: Sequence[int]) -> LowRank:
    """Several terms, of both wire dtypes, with weights."""
    terms = [
        LowRank(
            rng.standard_normal((rank, shape.into)).astype(adapter.WIRE_DTYPES[["float32", "bfloat16"][n % 2]]),
            rng.standard_normal((shape.out, rank)).astype(np.float32),
        )
        for n, rank in enumerate(ranks)
    ]
    return LowRank.sum(terms, rng.standard_normal(len(terms)).tolist())


RANKS = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=3), min_size=1, max_size=6)


@given(SEEDS, RANKS, RANKS)
@settings(max_examples=40)
def test_inner_products_are_those_of_the_dense_updates(
    seed: int, ranks: list[list[int]], more: list[list[int]]
) -> None:
    rng, shape = np.random.default_rng(seed), Shape(13, 7)
    rows = [low_rank(rng, shape, each) for each in ranks]
    columns = [low_rank(rng, shape, each) for each in more]
    left, right = (np.stack([one.delta().ravel() for one in side]).astype(np.float64) for side in (rows, columns))
    largest = np.linalg.norm(left, axis=1).max() * max(np.linalg.norm(side, axis=1).max() for side in (left, right))
    np.testing.assert_allclose(inner(rows), left @ left.T, atol=1e-5 * largest)
    np.testing.assert_allclose(inner(rows, columns), left @ right.T, atol=1e-5 * largest)
    np.testing.assert_array_equal(inner(rows), inner(rows).T)


@given(SEEDS, st.integers(2, 9))
@settings(max_examples=25)
def test_norms_and_cosines_are_those_of_the_dense_updates(seed: int, n_clients: int) -> None:
    members = honest(seed, n_clients, spread=20)
    updates = np.stack([dense(one.adapter) for one in members])
    for i, finding in enumerate(judge(members, ANY)):
        others = np.delete(updates, i, axis=0).mean(0)
        cosine = updates[i] @ others / np.linalg.norm(updates[i]) / np.linalg.norm(others)
        assert finding.norm == pytest.approx(np.linalg.norm(updates[i]), rel=1e-5)
        assert finding.cosine == pytest.approx(cosine, abs=1e-5)
        assert finding.verdict == "admitted" and not finding.reason


@given(SEEDS)
@settings(max_examples=10)
def test_clipped_modules_come_down_to_the_limit_and_cosines_are_taken_after_it(seed: int) -> None:
    members = honest(seed, 7, spread=1.5)
    members = put(members, 2, times(members[2].adapter, 5, only="v"))
    rules = pb.AdmissionSpec(outlier=8, clip=3, min_cosine=-1)
    findings = judge(members, rules)
    assert verdicts(findings) == ["admitted"] * 2 + ["clipped"] + ["admitted"] * 4
    norms = sorted(np.linalg.norm(one.adapter.modules["v"].delta()) for one in members)
    assert findings[2].scale == {"v": pytest.approx(3 * norms[3] / norms[-1], rel=1e-5)}
    assert findings[2].reason == f"1 of 3 modules scaled down, the most by {norms[-1] / norms[3] / 3:.1f} times"
    scaled = put(members, 2, times(members[2].adapter, findings[2].scale["v"], only="v"))
    updates = np.stack([dense(one.adapter) for one in scaled])
    for i, finding in enumerate(findings):
        others = np.delete(updates, i, axis=0).mean(0)
        expected = updates[i] @ others / np.linalg.norm(updates[i]) / np.linalg.norm(others)
        assert finding.cosine == pytest.approx(expected, abs=1e-5)


@given(SEEDS, st.randoms(use_true_random=False), st.integers(4, 10))
@settings(max_examples=20)
def test_the_order_of_arrival_does_not_matter(seed: int, random: object, n_clients: int) -> None:
    members = honest(seed, n_clients)
    members = put(members, 0, times(members[0].adapter, -1))
    members = put(members, 1, times(members[1].adapter, 50, only="down"))
    before = dict(zip([one.id for one in members], judge(members, RULES), strict=True))
    random.shuffle(members)  # type: ignore[attr-defined]
    for one, finding in zip(members, judge(members, RULES), strict=True):
        expected = before[one.id]
        assert (finding.verdict, finding.reason) == (expected.verdict, expected.reason)
        assert (finding.norm, finding.cosine) == pytest.approx((expected.norm, expected.cosine))


@given(SEEDS, st.integers(4, 12), st.floats(0, 1), st.floats(1, 2.5))
@settings(max_examples=60)
def test_honest_clients_with_unlike_data_are_all_admitted(seed: int, n: int, alike: float, spread: float) -> None:
    findings = judge(honest(seed, n, spread=spread, alike=max(alike, 0.05) if alike < 0.99 else 0.99), RULES)
    assert set(verdicts(findings)) == {"admitted"} and not any(finding.reason for finding in findings)


@pytest.mark.parametrize("n_clients", [5, 10])
@pytest.mark.parametrize("seed", range(5))
def test_attackers_are_caught_and_nobody_else(n_clients: int, seed: int) -> None:
    members = honest(seed, n_clients, spread=1.5, alike=0.6)
    own, bad = members[1].adapter, 1
    cases: dict[str, tuple[Adapter, pb.AdmissionSpec]] = {
        "its cosine to the mean of the others is -": (times(own, -1), RULES),
        "its cosine to the mean of the others is -0.": (times(own, -3), RULES),
        "times the cohort's median": (times(own, 100), RULES),
        "‖ΔW‖ of v is": (times(own, 100, only="v"), RULES),
        "it changes nothing": (times(own, 0), RULES),
        "the same update as client-0's": (members[0].adapter, RULES),
        "and the least is 0.4": (noise(own, seed + 1000), pb.AdmissionSpec(min_cosine=0.4)),
    }
    for reason, (update, rules) in cases.items():
        findings = judge(put(members, bad, update), rules)
        assert [n for n, finding in enumerate(findings) if finding.verdict != "admitted"] == [bad], reason
        assert findings[bad].verdict == "quarantined" and reason in findings[bad].reason


def test_an_outlier_is_named_by_its_worst_module() -> None:
    members = honest(0, 6, spread=1.0)
    update = times(times(members[3].adapter, 40, only="v"), 120, only="down")
    assert judge(put(members, 3, update), RULES)[3].reason == "‖ΔW‖ of down is 120 times the cohort's median"


def test_less_than_ten_times_the_median_is_clipped_however_close_together_the_others_are() -> None:
    members = honest(0, 6, spread=1.0)
    assert judge(put(members, 3, times(members[3].adapter, 9.9)), RULES)[3].verdict == "clipped"
    assert judge(put(members, 3, times(members[3].adapter, 1.2)), RULES)[3].verdict == "admitted"


def test_modules_that_hardly_anybody_has_changed_are_no_reason_to_clip() -> None:
    """Experts that got no tokens have B = 0 to the end."""
    members = honest(0, 6, spread=1.0)
    members = [put(members, n, times(one.adapter, 0, only="v"))[n] if n > 1 else one for n, one in enumerate(members)]
    assert set(verdicts(judge(members, RULES))) == {"admitted"}
    loud = judge(put(members, 1, times(members[1].adapter, 1000, only="v")), RULES)[1]
    assert loud.verdict == "quarantined" and loud.reason.startswith("‖ΔW‖ over all modules is")


@pytest.mark.parametrize("n_bad", [1, 2, 3, 4])
def test_a_loud_coherent_minority_does_not_turn_the_mean_around(n_bad: int) -> None:
    """Attackers who agree perfectly and are three times as loud, while honest clients agree little: their sum
    outweighs everybody else's, and a plain mean of others would take out the honest."""
    members = honest(1, 10, spread=1.2, alike=0.2)
    mean = {name: LowRank.sum([one.adapter.modules[name] for one in members], [0.1] * 10) for name in SHAPES}
    rng = np.random.default_rng(0)
    for n in range(n_bad):
        flipped = {}
        for name, one in mean.items():
            b = -one.b * (1 + 0.2 * rng.standard_normal(one.b.shape).astype(np.float32))
            size = np.linalg.norm(members[n].adapter.modules[name].delta()) / np.linalg.norm(b @ one.a)
            flipped[name] = LowRank(one.a, np.float32(2.9 * size) * b)
        members = put(members, n, Adapter(flipped))
    updates = np.stack([dense(one.adapter) for one in members])
    if n_bad > 2:
        assert min(update @ (updates.sum(0) - update) for update in updates[n_bad:]) < 0, "a plain mean would err"
    assert [finding.verdict == "quarantined" for finding in judge(members, RULES)] == [n < n_bad for n in range(10)]


def test_two_halves_that_contradict_each_other_are_left_to_the_operator() -> None:
    members = honest(2, 6, alike=0.8, spread=1.1)
    members = [put(members, n, times(one.adapter, -1))[n] if n % 2 else one for n, one in enumerate(members)]
    assert set(verdicts(judge(members, RULES))) == {"quarantined"}
    by_hand = [replace(one, by_hand=n % 2 == 0) for n, one in enumerate(members)]
    assert verdicts(judge(by_hand, RULES)) == ["admitted", "quarantined"] * 3


@pytest.mark.parametrize("n_clients", [1, 2, 3])
def test_small_cohorts_are_looked_at_for_nothing_and_for_duplicates_only(n_clients: int) -> None:
    members = honest(3, n_clients)
    wild = put(members, 0, times(members[0].adapter, -1000))
    findings = judge(wild, RULES)
    assert set(verdicts(findings)) == {"admitted"}
    assert all((finding.cosine is None) == (n_clients == 1) for finding in findings)
    findings = judge([*put(members, 0, times(members[0].adapter, 0)), members[-1]], RULES)
    assert findings[0].reason == "it changes nothing" and findings[0].cosine is None and findings[0].norm == 0
    if n_clients > 1:
        assert findings[-1].reason == f"the same update as client-{n_clients - 1}'s"
    assert judge([], RULES) == []


def test_the_later_of_two_duplicates_goes_and_copies_do_not_make_a_cohort() -> None:
    members = honest(4, 3)
    other = {  # the same ΔW by other factors, in another dtype
        name: LowRank(np.float32(0.5) * one.a[::-1], np.float32(2) * one.b[:, ::-1])
        for name, one in members[0].adapter.modules.items()
    }
    wild = put(members, 1, times(members[1].adapter, 1000))
    findings = judge([*wild, member(8, Adapter(other)), member(9, Adapter(other))], RULES)
    assert verdicts(findings) == ["admitted"] * 3 + ["quarantined"] * 2
    assert {finding.reason for finding in findings[3:]} == {"the same update as client-0's"}
    near = [*members, member(8, times(members[0].adapter, 1.0005))]
    assert judge(near, RULES)[3].verdict == "quarantined", "scaled by less than can be told from rounding"
    flipped = [*members, member(8, times(members[0].adapter, -1)), member(9, noise(members[0].adapter, 1))]
    assert not any("the same" in finding.reason for finding in judge(flipped, RULES)), "equal norms are not enough"


def test_what_the_operator_admits_stays_in_unscaled_and_what_was_found_is_told() -> None:
    members = honest(5, 6, spread=1.2)
    for update, found in (
        (times(members[2].adapter, 0), "it changes nothing"),
        (members[0].adapter, "the same update as client-0's"),
        (times(members[2].adapter, 500), "times the cohort's median"),
        (times(members[2].adapter, -1), "its cosine to the mean of the others is -"),
        (times(members[2].adapter, 6), "3 of 3 modules would be scaled down, the most by"),
    ):
        judged = judge(put(members, 2, update, by_hand=True), RULES)
        assert judged[2].verdict == "admitted" and found in judged[2].reason and not judged[2].scale
        without = judge(put(members, 2, update), RULES)
        assert without[2].verdict != "admitted"
        assert judged[:2] + judged[3:] == without[:2] + without[3:], "nobody else's finding depends on it"


def test_with_many_clients_those_drawn_by_lot_are_the_yardstick() -> None:
    members = honest(6, outliers._JURORS + 60)
    bad = [3, 17, 30, 150]
    for n in bad:
        members = put(members, n, times(members[n].adapter, -1))
    updates = np.stack([dense(one.adapter) for one in members])
    mean = np.delete(updates, bad, axis=0).mean(0)
    cosines = updates @ mean / np.linalg.norm(updates, axis=1) / np.linalg.norm(mean)
    findings = judge(members, RULES)
    assert [n for n, finding in enumerate(findings) if finding.verdict != "admitted"] == bad
    np.testing.assert_allclose([finding.cosine for finding in findings], cosines, atol=0.05)


def test_numbers_at_the_edge_of_float32_do_no_harm() -> None:
    members = honest(7, 6)
    giant = Adapter({name: LowRank(one.a * 1e38, one.b * 1e37) for name, one in members[0].adapter.modules.items()})
    findings = judge(put(members, 0, giant), RULES)
    assert findings[0].verdict == "quarantined" and set(verdicts(findings[1:])) == {"admitted"}
    findings = judge(put(members, 0, giant), ANY)
    assert set(verdicts(findings)) == {"admitted"} and np.isfinite(findings[0].norm)


def test_memory_is_flat_in_the_number_of_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_WORKERS", 1)  # how many layers are at work at once is no accident then
    shapes = {f"layers.{n}": Shape(512, 512) for n in range(6)}
    start, rng, files = adapter.initial(shapes, 32, seed=0), np.random.default_rng(0), []
    for n in range(60):
        files.append(tmp_path / f"{n}.safetensors")
        modules = {
            name: LowRank(one.a, rng.standard_normal(one.b.shape).astype(np.float32))
            for name, one in start.modules.items()
        }
        adapter.write(Adapter(modules), files[-1], "bfloat16")

    def peak(n_clients: int) -> int:
        members = [member(n, adapter.read(file)) for n, file in enumerate(files[:n_clients])]
        tracemalloc.start()
        judge(members, RULES)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(4)  # imports
    few, many = peak(10), peak(60)
    assert many < 1.6 * few, (few, many)
    assert many < 0.5 * gram._WORKERS * 60 * 32 * (512 + 512) * 4, "half of one layer of all of them, for each core"
