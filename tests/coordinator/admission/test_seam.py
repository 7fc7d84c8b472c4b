"""What every check of a contribution and of a cohort has to do, and the judge of what cannot be looked at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from converters import adapter, tensors
from converters.adapter import Adapter, LowRank, Shape
from coordinator.admission import outliers, soundness, unreadable
from coordinator.admission.outliers import Comparison, Member, Observation, judge
from coordinator.admission.soundness import Uploaded, judged, unsound
from coordinator.jobs import spec as jobs
from oneround import stream
from oneround.errors import BadAdapter, BadData
from oneround.v1 import federation_pb2 as pb
from tests.attacks.damage import mutations

SHAPES = {"model.q": Shape(12, 8), "model.down": Shape(8, 18)}
LONGEST = 510  # letters of a reason
BASE, TOKENIZER = "b" * 64, "c" * 64
SOUND = {"base": BASE, "tokenizer": TOKENIZER}


def one_line(reason: str) -> bool:
    return isinstance(reason, str) and len(reason) <= LONGEST and all(letter.isprintable() for letter in reason)


# ---- one contribution ----


def trained(seed: int = 0) -> Adapter:
    start, rng = adapter.initial(SHAPES, 2, 0), np.random.default_rng(seed)
    return Adapter(
        {
            name: LowRank(one.a, rng.standard_normal(one.b.shape).astype(np.float32))
            for name, one in start.modules.items()
        },
        SOUND,
    )


def uploaded(tmp_path: Path, *, freeze_a: bool = False) -> Uploaded:
    """A sound one."""
    table = {"name": "notes", "model": {"base": "org/model"}, "lora": {"rank": 2, "freeze_a": freeze_a}}
    spec = jobs.parse(table)
    initial, file = tmp_path / "initial", tmp_path / "upload"
    adapter.write(adapter.initial(SHAPES, 2, 0), initial)
    job = pb.Job(
        spec=spec,
        modules=[pb.Module(name=name, out_features=s.out, in_features=s.into) for name, s in SHAPES.items()],
        initial=pb.Artifact(digest=stream.digest(initial)),
        base_fingerprint=BASE,
        tokenizer=TOKENIZER,
    )
    adapter.write(trained(), file, "bfloat16", job.initial.digest if freeze_a else "")
    return Uploaded(file, pb.Declaration(num_examples=8, steps=3), job, initial)


def again(one: Uploaded) -> Uploaded:
    """Not looked at yet."""
    return Uploaded(one.file, one.declaration, one.job, one.initial)


def other_layout(one: Uploaded, change: Callable[[dict[str, LowRank]], object]) -> None:
    modules = dict(trained().modules)
    change(modules)
    adapter.write(Adapter(modules, SOUND), one.file, "bfloat16")


def header(one: Uploaded, **said: str) -> None:
    adapter.write(Adapter(trained().modules, SOUND | said), one.file, "bfloat16")


HOSTILE = "\x1b[2J\nx" * 2000

# By check: what it is there for, and a part of the reason.
UNSOUND: dict[str, list[tuple[Callable[[Uploaded], object], str]]] = {
    "initial": [],  # in a job whose A is frozen, below
    "layout": [
        (lambda one: other_layout(one, lambda modules: modules.pop("model.q")), "lacks 1 of the job's modules"),
        (lambda one: other_layout(one, lambda modules: modules.update(x=modules["model.q"])), "does not ask for"),
        (lambda one: other_layout(one, lambda modules: modules.update({HOSTILE: modules["model.q"]})), "not ask for"),
        (lambda one: other_layout(one, lambda modules: modules.update({"model.q": modules["model.down"]})), "of shape"),
        (lambda one: other_layout(one, lambda modules: modules.update({"model.q": LowRank(
            np.full((2, 8), np.nan, np.float32), np.ones((12, 2), np.float32))})), "factor A holds NaN or Inf"),
        (lambda one: one.file.write_bytes(b""), "the upload is not a safetensors file"),
        (lambda one: one.file.unlink(), "the upload is not there"),
        (lambda one: tensors.write(one.file, {"x": np.ones(3)}, {"format": "oneround/1"}), "unknown tensor"),
    ],
    "rank": [(lambda one: other_layout(one, lambda modules: modules.update({"model.q": LowRank(
        np.ones((3, 8), np.float32), np.ones((12, 3), np.float32))})), "has rank 3, the job asks for 2")],
    "dtype": [(lambda one: adapter.write(trained(), one.file, "float32"), "is in float32, the job asks for bfloat16")],
    "base": [(lambda one: header(one, base="x"), "trained over base x"),
             (lambda one: header(one, base=HOSTILE), "trained over base")],
    "tokenizer": [(lambda one: header(one, tokenizer=""), "another tokenizer: it names none"),
                  (lambda one: header(one, tokenizer=HOSTILE), "another tokenizer")],
    "declaration": [
        (lambda one: setattr(one.declaration, "num_examples", 0), "no training examples"),
        (lambda one: setattr(one.declaration, "num_examples", 2**63), "at most 10000000 of one client"),
        (lambda one: setattr(one.declaration, "num_examples", 900), "have room for 24"),
    ],
}  # fmt: skip
CASES = [(check, *case) for check, cases in UNSOUND.items() for case in cases]


def test_every_check_is_tried() -> None:
    assert list(UNSOUND) == list(soundness.CHECKS)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_what_is_sound_passes_all_checks(tmp_path: Path, freeze_a: bool) -> None:
    one = uploaded(tmp_path, freeze_a=freeze_a)
    assert {name: judged(check, one) for name, check in soundness.CHECKS.items()} == dict.fromkeys(soundness.CHECKS, "")
    assert unsound(one.file, one.declaration, one.job, one.initial) == ""


@pytest.mark.parametrize(("check", "spoil", "says"), CASES, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(CASES)])
def test_what_a_check_finds(tmp_path: Path, check: str, spoil: Callable[[Uploaded], object], says: str) -> None:
    one = uploaded(tmp_path)
    spoil(one)
    reason = judged(soundness.CHECKS[check], again(one))
    assert says in reason and one_line(reason) and str(one.file) not in reason
    assert unsound(one.file, one.declaration, one.job, one.initial) == reason, "and no other one comes before it"


def test_a_part_goes_with_the_jobs_own_initial_adapter(tmp_path: Path) -> None:
    one = uploaded(tmp_path, freeze_a=True)
    for frozen_a in ("", "0" * 64):
        adapter.write(trained(), one.file, "bfloat16", frozen_a)
        reason = unsound(one.file, one.declaration, one.job, one.initial)
        assert (
            reason == f"A is frozen in this job: only B is taken, with frozen_a={one.job.initial.digest} in its header"
        )


@pytest.mark.parametrize("freeze_a", [False, True])
def test_no_bytes_make_a_check_raise_or_change_its_mind(tmp_path: Path, freeze_a: bool) -> None:
    """Nor does looking change anything."""
    sound = uploaded(tmp_path, freeze_a=freeze_a)
    raw, refused = sound.file.read_bytes(), 0
    before = sound.declaration.SerializeToString(), sound.job.SerializeToString(), sound.initial.read_bytes()  # type: ignore[union-attr]
    for changed in mutations(raw, 8 + int.from_bytes(raw[:8], "little"), 160):
        sound.file.write_bytes(changed)
        reasons = [{name: judged(check, again(sound)) for name, check in soundness.CHECKS.items()} for _ in range(2)]
        assert reasons[0] == reasons[1] and all(one_line(reason) for reason in reasons[0].values())
        assert sound.file.read_bytes() == changed
        refused += any(reasons[0].values())
    after = sound.declaration.SerializeToString(), sound.job.SerializeToString(), sound.initial.read_bytes()  # type: ignore[union-attr]
    assert before == after and refused > 40


def test_a_check_of_one_is_one_function_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = uploaded(tmp_path)
    monkeypatch.setitem(soundness.CHECKS, "new", lambda uploaded: f"{len(uploaded.update.modules)} modules\nare many")
    assert unsound(one.file, one.declaration, one.job, one.initial) == "2 modules are many"

    def faulty(uploaded: Uploaded) -> str:
        raise ZeroDivisionError(f"in {uploaded.file}")

    monkeypatch.setitem(soundness.CHECKS, "new", faulty)
    reason = unsound(one.file, one.declaration, one.job, one.initial)
    assert reason == "it cannot be read: ZeroDivisionError: in the upload"


# ---- what cannot be looked at ----


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (BadData("the upload is cut off"), "the upload is cut off"),
        (BadAdapter("a\nb"), "a b"),
        (BrokenProcessPool("a process was terminated abruptly"), "the process that read it died of it"),
        (MemoryError(), "it cannot be read: MemoryError:"),
        (ValueError("/blobs/x: no"), "it cannot be read: ValueError: the upload: no"),
        (RecursionError(HOSTILE), "it cannot be read: RecursionError: [2J x"),
    ],
)
def test_why_a_look_failed(error: Exception, says: str) -> None:
    reason = unreadable.reason(error, Path("/blobs/x"))
    assert reason.startswith(says) and one_line(reason)


# ---- a cohort ----


def members(count: int = 8) -> list[Member]:
    """One changes nothing, one sends what another has sent, one is far too large, one large, one turned round."""
    common = trained(99)
    cohort = []
    for n in range(count):
        weights = {0: [0.0, 0.0], 2: [60.0, 20.0], 3: [6.0, 2.0], 4: [-1.0, 0.2]}.get(n, [1.0, 0.3])
        own = trained(1 if n == 7 else n)
        modules = {name: LowRank.sum([common.modules[name], own.modules[name]], weights) for name in SHAPES}
        cohort.append(Member(f"id-{n}", f"client {n}", Adapter(modules), 10))
    return cohort


def array_bytes(comparison: Comparison) -> tuple[bytes, ...]:
    arrays = [comparison.norms, comparison.scale, comparison.cosines]
    factors = [
        factor
        for member in comparison.members
        for one in member.adapter.modules.values()
        for factor in (one.a, one.b)  # type: ignore[attr-defined]
    ]
    return tuple(array.tobytes() for array in (*arrays, *factors))


def seen(observation: Observation) -> tuple[object, ...]:
    arrays = [None if array is None else array.tobytes() for array in (observation.scale, observation.cosines)]
    return dict(observation.reasons), observation.empty, *arrays


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rules", [pb.AdmissionSpec(), pb.AdmissionSpec(clip=0, outlier=0, min_cosine=-1)])
def test_what_every_check_of_a_cohort_holds_to(count: int, rules: pb.AdmissionSpec) -> None:
    comparison = Comparison.of(members(count))
    for name, check in outliers.CHECKS.items():
        before = array_bytes(comparison), list(comparison.reasons), copy.copy(comparison)
        one, two = check(comparison, rules), check(comparison, rules)
        assert seen(one) == seen(two), f"{name} says the same twice"
        assert array_bytes(comparison) == before[0] and list(comparison.reasons) == before[1], f"{name} changes nothing"
        assert set(one.reasons) <= set(range(count)) and all(one_line(reason) for reason in one.reasons.values())
        if one.scale is not None:
            assert one.scale.shape == comparison.norms.shape and ((one.scale > 0) & (one.scale <= 1)).all()
        if one.cosines is not None:
            finite = one.cosines[~np.isnan(one.cosines)]
            assert one.cosines.shape == (count,) and (np.abs(finite) <= 1).all()
        comparison = comparison.after(one)


def test_every_check_of_a_cohort_finds_its_own() -> None:
    comparison, rules = Comparison.of(members()), pb.AdmissionSpec()
    found: dict[str, dict[int, str]] = {}
    for name, check in outliers.CHECKS.items():
        observation = check(comparison, rules)
        found[name] = dict(observation.reasons)
        comparison = comparison.after(observation)
    assert found.keys() == {"repeats", "norms", "clip", "direction"}
    assert found["repeats"] == {0: "it changes nothing", 7: "the same update as client 1's"}
    assert found["norms"].keys() == {2} and "times the cohort's median" in found["norms"][2]
    assert found["direction"].keys() == {4} and "cosine" in found["direction"][4]
    assert comparison.size == 6 and list(comparison.live) == [1, 3, 5, 6]
    assert (comparison.scale[3] < 1).all() and (comparison.scale[[1, 5, 6]] == 1).all()


def test_a_check_of_a_cohort_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(comparison: Comparison, rules: pb.AdmissionSpec) -> Observation:
        counts = [member.num_examples for member in comparison.members]
        return Observation({i: "too few examples" for i, count in enumerate(counts) if count < 10 or i == 2})

    monkeypatch.setitem(outliers.CHECKS, "few", few)
    cohort = members()
    cohort[5] = Member("id-5", "client 5", cohort[5].adapter, 3)
    assessed = judge(cohort, pb.AdmissionSpec())
    assert (assessed[5].verdict, assessed[5].reason) == ("quarantined", "too few examples")
    assert "times the cohort's median" in assessed[2].reason, "the first reason stands"
