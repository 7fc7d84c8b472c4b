"""What any training backend has to hold to. A new one is here as soon as it is registered; what it takes to agree with
the others to a rounding is in test_backends.py."""

import hashlib
import inspect
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from converters import adapter
from converters.adapter import Adapter, Shape
from edge_client import backends
from edge_client.backends import BACKENDS, EXACT, Backend, Progress, Setup
from edge_client.data.batches import Batches
from edge_client.training.recipe import PRECISIONS, Recipe
from edge_client.training.snapshot import Snapshot
from oneround.errors import BadModel, LayoutMismatch
from oneround.v1 import federation_pb2 as pb
from tests.edge_client import tiny

STEPS_AN_EPOCH, EPOCHS = 3, 4
KEPT = 5  # the step whose snapshot is kept; in the middle of an epoch


@dataclass(frozen=True)
class TrainingRun:
    losses: tuple[float, ...]
    snapshot: Snapshot | None  # at step KEPT
    result: Adapter


@dataclass(frozen=True)
class BackendCase:
    """A backend, a tiny model, and what to train on it."""

    backend: Backend
    base: Path
    initial: Adapter
    plan: Batches

    @property
    def on_cpu(self) -> bool:
        return self.backend.device().startswith("cpu")

    def recipe(self, dropout: float = 0.0, *, freeze_a: bool = False) -> Recipe:
        spec = pb.JobSpec(train=pb.TrainSpec(learning_rate=1e-2), lora=pb.LoraSpec(dropout=dropout, freeze_a=freeze_a))
        return Recipe.from_spec(spec, self.plan.total_steps)

    def train(self, recipe: Recipe, snapshot: Snapshot | None = None, setup: Setup = EXACT) -> TrainingRun:
        losses, kept = list(snapshot.losses if snapshot else ()), list[Snapshot]()

        def on_step(progress: Progress) -> None:
            losses.append(progress.loss)
            assert (progress.step, progress.total_steps) == (len(losses), self.plan.total_steps)
            assert progress.tokens == self.plan.batch(progress.step - 1).num_targets and progress.seconds > 0
            if progress.step == KEPT:
                kept.append(Snapshot(tuple(losses), progress.arrays(), progress.setup))

        result = self.backend.train(self.base, self.initial, recipe, self.plan, on_step, snapshot, setup)
        assert len(losses) == self.plan.total_steps
        return TrainingRun(tuple(losses), kept[0] if kept else None, result)


@pytest.fixture(scope="module", params=BACKENDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BackendCase:
    backend = backends.load(request.param)
    if why := backend.available():
        pytest.skip(f"{request.param} cannot be used here: {why}")
    base = tiny.llama(tmp_path_factory.mktemp(request.param) / "base", tied=True)
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(4, 2, 3))
    return BackendCase(backend, base, initial, Batches(tiny.examples(24), 8, EPOCHS, seed=3))


@pytest.fixture(scope="module")
def run(case: BackendCase) -> TrainingRun:
    return case.train(case.recipe())


@pytest.fixture(scope="module")
def with_dropout(case: BackendCase) -> TrainingRun:
    return case.train(case.recipe(dropout=0.2))


def distance(one: Adapter, other: Adapter) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules together."""
    apart = sum(np.sum((one.modules[name].delta() - other.modules[name].delta()) ** 2) for name in one.modules)
    return float(np.sqrt(apart / sum(np.sum(factors.delta() ** 2) for factors in one.modules.values())))


def assert_same(case: BackendCase, one: TrainingRun, other: TrainingRun) -> None:
    """To the bit on a CPU."""
    if not case.on_cpu:
        assert distance(one.result, other.result) < 1e-3
        return
    assert one.losses == other.losses
    for name, factors in one.result.modules.items():
        assert np.array_equal(factors.a, other.result.modules[name].a)
        assert np.array_equal(factors.b, other.result.modules[name].b)


@pytest.mark.parametrize("name", BACKENDS)
def test_it_offers_the_whole_protocol(name: str) -> None:
    backend = backends.load(name)
    assert backend.name == name
    for member, function in inspect.getmembers(Backend, inspect.isfunction):
        if member.startswith("_"):
            continue
        wanted = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
        assert list(inspect.signature(getattr(backend, member)).parameters) == wanted, member
    reason = backend.available()
    assert reason is None or (reason and "\n" not in reason)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_extra_installs_it_and_it_may_be_preferred(name: str) -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"][name]
    assert BACKENDS[name].preferred() in (True, False)
    assert name not in backends.others(name) and len(backends.others(name)) == len(BACKENDS) - 1


def test_what_it_says_of_this_machine(case: BackendCase) -> None:
    assert case.backend.device().split()[0] in ("cuda", "mps", "metal", "cpu")
    assert case.backend.precision() in PRECISIONS
    figures = case.backend.memory_figures()
    assert 1.0 <= figures.overhead < 4.0 and figures.logits_at_once >= 0
    assert figures.in_main_memory or not case.on_cpu, "a CPU has the machine's memory"


def test_exactly_the_modules_of_the_initial_adapter_in_their_shapes(case: BackendCase, run: TrainingRun) -> None:
    adapter.check(run.result, {name: factors.shape for name, factors in case.initial.modules.items()})
    assert run.result.ranks == case.initial.ranks
    for factors in run.result.modules.values():
        assert factors.a.dtype == factors.b.dtype == np.float32
        assert np.isfinite(factors.a).all() and np.isfinite(factors.b).all()


def test_it_learns(case: BackendCase, run: TrainingRun) -> None:
    assert np.mean(run.losses[-STEPS_AN_EPOCH:]) < np.mean(run.losses[:STEPS_AN_EPOCH]) - 0.05
    assert distance(case.initial, run.result) > 0.05


def test_the_same_again_and_with_another_seed_not(case: BackendCase, with_dropout: TrainingRun) -> None:
    recipe = case.recipe(dropout=0.2)
    assert_same(case, with_dropout, case.train(recipe))
    assert distance(with_dropout.result, case.train(replace(recipe, seed=1)).result) > 1e-3


def test_it_resumes_from_a_snapshot_as_if_nothing_had_been(case: BackendCase, with_dropout: TrainingRun) -> None:
    kept = with_dropout.snapshot
    assert kept is not None and kept.step == KEPT
    assert kept.arrays.keys() == {
        f"{name}.{part}{moment}"
        for name in case.initial.modules
        for part in ("a", "b")
        for moment in ("", ".first", ".second")
    }
    assert all(array.dtype == np.float32 for array in kept.arrays.values())
    assert_same(case, with_dropout, case.train(case.recipe(dropout=0.2), kept))


def test_an_interruption_leaves_nothing_behind(case: BackendCase, run: TrainingRun) -> None:
    class Enough(BaseException):
        pass

    def stop(progress: Progress) -> None:
        raise Enough

    before = [*_everything(case)]
    with pytest.raises(Enough):
        case.backend.train(case.base, case.initial, case.recipe(), case.plan, stop)
    assert [*_everything(case)] == before, "the base and the initial adapter are as they were"
    assert_same(case, run, case.train(case.recipe()))


def _everything(case: BackendCase) -> Iterator[tuple[str, str]]:
    for file in sorted(case.base.iterdir()):
        yield file.name, hashlib.sha256(file.read_bytes()).hexdigest()
    for name, factors in case.initial.modules.items():
        yield name, hashlib.sha256(factors.a.tobytes() + factors.b.tobytes()).hexdigest()


def test_a_frozen_a_stays_and_b_learns(case: BackendCase) -> None:
    frozen = case.train(case.recipe(freeze_a=True))
    assert frozen.snapshot is not None and not any(".a" in name for name in frozen.snapshot.arrays)
    for name, factors in frozen.result.modules.items():
        assert np.array_equal(factors.a, case.initial.modules[name].a)
        assert not np.array_equal(factors.b, case.initial.modules[name].b)


def test_a_smaller_setup_gives_the_same(case: BackendCase, run: TrainingRun) -> None:
    smaller = case.train(case.recipe(), setup=Setup(parts=3, checkpointing=True))
    assert np.abs(np.array(run.losses) - smaller.losses).max() < 1e-4
    assert distance(run.result, smaller.result) < 1e-3


def test_what_it_cannot_train_it_says_in_a_line(case: BackendCase) -> None:
    assert case.backend.incompatible(case.base, case.plan) == ""

    class Unheard(Batches):
        loss = "a loss that nobody knows"

    why = case.backend.incompatible(case.base, Unheard(tiny.examples(8), 8, 1, 0))
    assert "a loss that nobody knows" in why and "\n" not in why


def test_a_base_that_does_not_fit_is_told(case: BackendCase, tmp_path: Path) -> None:
    def train(base: Path, modules: dict[str, Shape]) -> None:
        initial = adapter.initial(modules, 2, 0)
        case.backend.train(base, initial, case.recipe(), case.plan, _nothing)

    name, shape = next(iter(tiny.modules_of(case.base).items()))
    with pytest.raises(LayoutMismatch):
        train(case.base, {name.replace(".0.", ".7."): shape})
    with pytest.raises(LayoutMismatch):
        train(case.base, {name: Shape(shape.into, shape.out)})
    with pytest.raises(BadModel):
        train(tmp_path, {name: shape})


_nothing: Callable[[Progress], None] = lambda progress: None  # noqa: E731
