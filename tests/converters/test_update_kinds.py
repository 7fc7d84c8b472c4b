"""What every kind of update has to do. Run over each that jobs can ask for, and over two that only tests have: dense
matrices, in the form of a kind of their own (tests/updates.py), and vectors."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from google.protobuf import json_format

from converters import tensors
from converters.adapter import LowRank
from converters.tensors import Array, Later
from converters.updates import kinds, sizes
from converters.updates.kinds import KINDS, MODULES, UpdateKind
from converters.updates.update import (
    FLOAT32,
    WIRE_DTYPES,
    Factor,
    Floats,
    ModuleUpdate,
    Shape,
    Truncated,
    Update,
    check,
)
from coordinator.jobs import spec as jobs
from oneround import rules, stream
from oneround.errors import BadData, LayoutMismatch
from oneround.v1 import federation_pb2 as pb
from tests import updates as dense
from tests.attacks.damage import mutations
from tests.updates import Dense


class Vector(ModuleUpdate):
    """What is added to a bias or a norm, whose weight is a vector: (out, 1)."""

    kind = "vector"

    def __init__(self, vector: Array) -> None:
        self.vector = vector

    @property
    def shape(self) -> Shape:
        return Shape(len(self.vector), 1)

    @classmethod
    def sum(cls, updates: Iterable[Self], weights: Iterable[float]) -> Self:
        pairs = zip(updates, weights, strict=True)
        return cls(np.sum([np.float32(weight) * update.vector for update, weight in pairs], axis=0, dtype=np.float32))

    @classmethod
    def inner(cls, rows: Sequence[Self], columns: Sequence[Self] | None = None) -> Floats:
        left, right = (np.stack([one.vector for one in many]).astype(float) for many in (rows, columns or rows))
        products: Floats = left @ right.T
        return products

    @classmethod
    def nearest(cls, dense: Factor, rank: int) -> Truncated[Self]:
        energy = float(np.square(dense, dtype=float).sum())
        return Truncated(cls(dense[:, 0]), energy, energy)

    def add_to(self, dense: Factor, rows: Any = slice(None)) -> Factor:
        dense[:, 0] += self.vector[rows]
        return dense

    def tensors(self, dtype: np.dtype[Any] = FLOAT32) -> dict[str, Later]:
        return {".vector": Later(dtype, self.vector.shape, lambda: self.vector.astype(dtype))}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Array]) -> Self:
        return cls(stored[".vector"])

    def forget(self) -> None:
        tensors.forget(self.vector)


def low_rank(rng: np.random.Generator, shape: Shape) -> ModuleUpdate:
    a, b = rng.standard_normal((3, shape.into)), rng.standard_normal((shape.out, 3))
    return LowRank(a.astype(np.float32), b.astype(np.float32))


def of_matrix(rng: np.random.Generator, shape: Shape) -> ModuleUpdate:
    return Dense(rng.standard_normal(shape).astype(np.float32))


def of_vector(rng: np.random.Generator, shape: Shape) -> ModuleUpdate:
    return Vector(rng.standard_normal(shape.out).astype(np.float32))


Make = Callable[[np.random.Generator, Shape], ModuleUpdate]
MAKERS: dict[type[ModuleUpdate], Make] = {LowRank: low_rank, Dense: of_matrix, Vector: of_vector}
SHAPE = Shape(130, 70)
each_class = pytest.mark.parametrize("make", MAKERS.values(), ids=[cls.kind for cls in MAKERS])


def some(make: Make, count: int) -> list[ModuleUpdate]:
    rng = np.random.default_rng(0)
    return [make(rng, SHAPE) for _ in range(count)]


def content(update: ModuleUpdate) -> dict[str, np.ndarray]:
    return {end: np.array(tensor.make(), np.float32) for end, tensor in update.tensors().items()}


def same(one: ModuleUpdate, other: ModuleUpdate) -> bool:
    return all(np.array_equal(array, content(other)[end]) for end, array in content(one).items())


close = np.testing.assert_allclose


def test_all_that_jobs_can_ask_for_are_here() -> None:
    assert set(MODULES.values()) <= MAKERS.keys()


# ---- one module's update ----


@each_class
def test_it_adds_its_rows_in_place(make: Make) -> None:
    (update,) = some(make, 1)
    whole = update.delta()
    assert whole.shape == update.shape and whole.dtype == np.float32 and whole.any()
    for rows in (slice(10, 20), np.array([3, 100, 4])):
        target = np.ones((len(whole[rows]), update.shape.into), np.float32)
        assert update.add_to(target, rows) is target
        close(target, 1 + whole[rows], atol=1e-5)


@each_class
def test_sums_are_those_of_the_weights(make: Make) -> None:
    updates, weights = some(make, 4), [0.5, -1.0, 0.0, 2.0]
    before = [content(update) for update in updates]
    expected = sum(weight * update.delta() for update, weight in zip(updates, weights, strict=True))
    total = updates[0].sum(updates, weights)
    close(total.delta(), expected, atol=1e-4)
    close(updates[0].sum([total], [3.0]).delta(), 3 * expected, atol=1e-4)
    close(updates[0].plus(updates[1], -0.5).delta(), updates[0].delta() - 0.5 * updates[1].delta(), atol=1e-4)
    close(updates[0].plus(updates[0], -1.0).delta(), 0 * expected, atol=1e-6)
    for update, was in zip(updates, before, strict=True):
        assert all(np.array_equal(array, was[end]) for end, array in content(update).items()), "nothing changes it"


@each_class
def test_inner_products_are_those_of_the_weights(make: Make) -> None:
    updates = some(make, 5)
    flat = np.stack([update.delta().ravel().astype(np.float64) for update in updates])
    products = updates[0].inner(updates)
    assert products.dtype == np.float64
    close(products, products.T, rtol=1e-12)
    close(products, flat @ flat.T, rtol=1e-5, atol=1e-3)
    close(updates[0].inner(updates[:2], updates[2:]), flat[:2] @ flat[2:].T, rtol=1e-5, atol=1e-3)
    stacked = updates[0].sum(updates, [1.0] * 5)
    close(stacked.energy(), np.square(flat.sum(0)).sum(), rtol=1e-5)


@each_class
def test_what_is_of_its_kind_is_nearest_to_itself(make: Make) -> None:
    (update,) = some(make, 1)
    near = update.nearest(update.delta(), update.rank)
    close(near.update.delta(), update.delta(), atol=1e-4)
    close([near.kept, near.whole], update.energy(), rtol=1e-4)
    kept = update.compact(0)
    assert kept.update is update and kept.kept == kept.whole == 0, "nobody asked for a rank, or its energy"
    kept = update.compact(update.rank + 1)
    assert kept.update is update and kept.kept == kept.whole == pytest.approx(update.energy())


@each_class
def test_its_tensors_are_all_of_it(make: Make, tmp_path: Path) -> None:
    update, other = some(make, 2)
    tensors.write(tmp_path / "x", update.tensors(), {})
    stored, _ = tensors.read(tmp_path / "x")
    again = update.from_tensors(stored)
    assert update.equals(again) and again.equals(update) and not update.equals(other)
    assert again.shape == update.shape and np.array_equal(again.delta(), update.delta())
    assert update.infinite() == ""
    for end in stored:
        bad = {name: np.array(tensor) for name, tensor in stored.items()}
        for value in (np.nan, np.inf):
            bad[end].flat[-1] = value
            assert update.from_tensors(bad).infinite()


@each_class
def test_tensors_can_be_averaged_by_themselves(make: Make) -> None:
    updates, weights = some(make, 3), [0.2, 0.3, 0.5]
    mean = content(updates[0].by_tensor(updates, weights))
    for end, array in mean.items():
        expected = sum(weight * content(update)[end] for update, weight in zip(updates, weights, strict=True))
        close(array, expected, rtol=1e-5, atol=1e-5)
    start = updates[1]
    assert start.by_tensor([start] * 2, [0.5, 0.5]).equals(start)
    close(updates[0].between(start, 0.0).delta(), start.delta(), atol=1e-5)
    close(updates[0].between(start, 1.0).delta(), updates[0].delta(), atol=1e-4)


@each_class
def test_a_frozen_part_is_one_that_all_have(make: Make) -> None:
    updates = some(make, 3)
    assert not updates[0].have_one_frozen_part(updates)


def test_factors_with_one_a_have_it() -> None:
    first, rng = some(low_rank, 1)[0], np.random.default_rng(1)
    assert isinstance(first, LowRank)
    others = [LowRank(first.a.copy(), rng.standard_normal(first.b.shape).astype(np.float32)) for _ in range(3)]
    assert first.have_one_frozen_part([first, *others])
    kept = others[0].plus(first, -0.5, keep_rank=True)
    assert kept.rank == first.rank
    close(kept.delta(), others[0].delta() - 0.5 * first.delta(), atol=1e-5)


@pytest.mark.parametrize("make", [low_rank, of_matrix])
def test_a_sum_of_files_reads_none_of_them(make: Make, tmp_path: Path) -> None:
    rng, files = np.random.default_rng(0), []
    for n in range(40):
        files.append(tmp_path / str(n))
        tensors.write(files[-1], make(rng, Shape(400, 300)).tensors(), {})
    cls = type(make(rng, SHAPE))
    mapped = [cls.from_tensors(tensors.read(file)[0]) for file in files]
    one = files[0].stat().st_size
    tracemalloc.start()
    total = cls.sum(mapped, [1 / 40] * 40)
    named = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    total.delta()
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert named < 20_000 and highest < 8 * max(one, 400 * 300 * 4), (named, highest, one)


# ---- a kind, for a job ----

SHAPES = {"model.q": Shape(24, 16), "model.down": Shape(16, 40), "model.v": Shape(8, 16)}
OF_JOBS: dict[str, UpdateKind] = {**KINDS, "dense": dense}


@pytest.fixture(params=OF_JOBS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> UpdateKind:
    """Each kind, one after another, behind the table of a job; those of the tests borrow one."""
    name: str = request.param
    if name not in KINDS:
        monkeypatch.setitem(KINDS, kinds.DEFAULT, OF_JOBS[name])
    return OF_JOBS[name]


def announced(kind: UpdateKind, **lora: Any) -> pb.Job:
    spec = jobs.parse({"name": "notes", "model": {"base": "org/model"}, "lora": {"rank": 3, **lora}})
    return pb.Job(spec=spec, modules=[kind.announced(name, shape, spec) for name, shape in SHAPES.items()])


def trained(kind: UpdateKind, job: pb.Job) -> Update[Any]:
    """The initial update, changed where clients change it."""
    rng, start = np.random.default_rng(0), kind.initial(SHAPES, job.spec)
    first = {name: module.sum([module], [1.0]) for name, module in start.modules.items()}
    changed = {}
    for name, module in first.items():
        stored = {end: np.array(tensor.make()) for end, tensor in module.tensors().items()}
        last = list(stored)[-1]  # what is trained in any case
        stored[last] = rng.standard_normal(stored[last].shape).astype(np.float32)
        changed[name] = module.from_tensors(stored)
    return Update(changed, {"base": "x"})


def test_every_case_of_the_wire_has_an_entry() -> None:
    cases = pb.JobSpec.DESCRIPTOR.oneofs_by_name["update"].fields
    assert {field.name for field in cases} == KINDS.keys() and kinds.DEFAULT in KINDS
    for field in cases:
        assert {"target_modules", "start_from"} <= set(field.message_type.fields_by_name), field.name
    assert {field.name for field in pb.Module.DESCRIPTOR.oneofs_by_name["tuned"].fields} == MODULES.keys()
    assert {kind.MODULE for kind in KINDS.values()} <= set(MODULES.values())


@pytest.mark.parametrize("name", KINDS)
def test_its_rules_are_about_its_table_and_hold_for_the_defaults(name: str) -> None:
    spec = jobs.parse({"name": "notes", "model": {"base": "org/model"}, name: {}})
    assert kinds.name_of(spec) == name
    for key, holds, expected in KINDS[name].rules_of(spec):
        assert key.startswith(f"{name}.") and holds and expected, key
    assert not rules.broken(spec, KINDS[name].rules_of(spec))


def test_what_all_start_from_is_nothing_and_the_same(kind: UpdateKind) -> None:
    job = announced(kind)
    first, again = (kind.initial(SHAPES, job.spec) for _ in range(2))
    check(first, SHAPES)
    for name, module in first.modules.items():
        assert isinstance(module, kind.MODULE) and not module.delta().any() and module.equals(again.modules[name])
    assert set(first.ranks.values()) == {kind.rank(job.spec)}


def test_an_update_is_read_back(kind: UpdateKind, tmp_path: Path) -> None:
    job = announced(kind)
    update = trained(kind, job)
    for dtype in WIRE_DTYPES:
        job.spec.upload.dtype = dtype
        kind.write(update, tmp_path / dtype, dtype)
        back = kind.read(tmp_path / dtype)
        check(back, SHAPES)
        assert back.metadata["base"] == "x" and back.ranks == update.ranks
        for name, module in update.modules.items():
            close(back.modules[name].delta(), module.delta(), atol=0.2 if dtype == "bfloat16" else 0.02)
        size = (tmp_path / dtype).stat().st_size
        assert sizes.sent_bytes(job) < size <= sizes.finished_bytes(job) < size + 20_000
        assert size <= sizes.most_initial_bytes(job) <= sizes.most_upload_bytes(job)
        numbers = sum(tensor.size for tensor in tensors.read(tmp_path / dtype)[0].values())
        assert numbers == kind.elements(job) == kind.elements(job, whole=True) == sizes.elements(job)
    kind.write(update, tmp_path / "again", "float32")
    assert stream.digest(tmp_path / "again") == stream.digest(tmp_path / "float32")


def test_a_partial_update_is_completed(kind: UpdateKind, tmp_path: Path) -> None:
    job = announced(kind, freeze_a=True)
    if not kind.is_partial(job.spec):
        assert kinds.frozen(job.spec, tmp_path / "nowhere") is None
        return
    update = trained(kind, job)
    kind.write(kind.initial(SHAPES, job.spec), tmp_path / "initial")
    digest = stream.digest(tmp_path / "initial")
    kind.write(update, tmp_path / "part", "float32", digest)
    assert sum(tensor.size for tensor in tensors.read(tmp_path / "part")[0].values()) == kind.elements(job)
    assert kind.elements(job) < kind.elements(job, whole=True) and kind.is_linear(job.spec)
    with pytest.raises(BadData):
        kind.read(tmp_path / "part")
    back = kind.read(tmp_path / "part", kinds.frozen(job.spec, tmp_path / "initial"))
    assert all(same(back.modules[name], module) for name, module in update.modules.items())
    assert kind.astray(back, digest) == "" and kind.astray(back, "0" * 64) and kind.astray(update, digest)
    assert kinds.needs_initial(job.spec)


def test_a_client_takes_its_own_coordinators_jobs(kind: UpdateKind, tmp_path: Path) -> None:
    job = announced(kind)
    assert kinds.unannounced(job) == ""
    assert kinds.shapes(job.modules) == SHAPES
    kind.write(kind.initial(SHAPES, job.spec), tmp_path / "initial")
    assert kinds.read_initial(tmp_path / "initial", job).shapes == SHAPES
    for change in (lambda job: job.modules.pop(), lambda job: setattr(job.modules[0], "in_features", 15)):
        other = pb.Job()
        other.CopyFrom(job)
        change(other)
        with pytest.raises(LayoutMismatch):
            kinds.read_initial(tmp_path / "initial", other)


def test_damaged_files_are_refused_by_name_or_read(kind: UpdateKind, tmp_path: Path) -> None:
    kind.write(trained(kind, announced(kind)), tmp_path / "sound")
    raw, refused = (tmp_path / "sound").read_bytes(), 0
    for changed in mutations(raw, 8 + int.from_bytes(raw[:8], "little"), 200):
        (tmp_path / "damaged").write_bytes(changed)
        try:
            check(kind.read(tmp_path / "damaged"), SHAPES)
        except BadData as error:
            assert str(error)
            refused += 1
    assert refused > 50


# ---- the wire ----


# A job as the version before the oneofs sent it, and as its JSON, which manifests and outboxes hold.
BEFORE = (
    b'\n,\n\x05notes\x12\x0b\n\torg/model\x1a\x0b\x08\x04\x11\x00\x00\x00\x00\x00\x00 @"\t\t\x00\x00\x00\x00\x00'
    b"\x00\x00@\x12\x07\n\x01q\x10\x06\x18\x04: 00000000000000000000000000000000"
)
BEFORE_JSON = (
    '{"spec": {"name": "notes", "model": {"base": "org/model"}, "lora": {"rank": 4, "alpha": 8.0}, "train": {"epochs":'
    ' 2.0}}, "modules": [{"name": "q", "out_features": 6, "in_features": 4}], "id": "00000000000000000000000000000000"}'
)


def test_jobs_from_before_the_oneof_are_the_same() -> None:
    job = pb.Job.FromString(BEFORE)
    assert kinds.name_of(job.spec) == "lora" and (job.spec.lora.rank, job.spec.lora.alpha) == (4, 8.0)
    assert job.SerializeToString(deterministic=True) == BEFORE
    assert json_format.Parse(BEFORE_JSON, pb.Job()) == job
    assert json.loads(BEFORE_JSON) == json_format.MessageToDict(job, preserving_proto_field_name=True)
    assert sizes.elements(job) == 4 * (6 + 4) and kinds.unannounced(job) == ""


def test_a_job_that_names_no_kind_is_a_lora_job() -> None:
    bare = pb.JobSpec(name="notes", model=pb.ModelSpec(base="org/model"))
    assert bare.WhichOneof("update") is None and kinds.name_of(bare) == "lora"
    filled = jobs.filled(bare)
    assert filled.lora.HasField("rank") and filled == jobs.filled(filled) and bare.WhichOneof("update") is None


def test_modules_from_before_the_oneof_are_low_rank() -> None:
    job = announced(KINDS["lora"])
    assert {module.low_rank.rank for module in job.modules} == {3}
    job.modules[0].low_rank.rank = 4
    assert kinds.unannounced(job) == "model.q is of rank 4, and lora.rank is 3"
    for module in job.modules:
        module.ClearField("tuned")
    assert kinds.unannounced(job) == ""


def test_a_kind_that_only_a_newer_version_knows() -> None:
    job = announced(KINDS["lora"])
    job.spec.ClearField("update")
    newer = job.SerializeToString()
    assert "does not know" in kinds.unannounced(pb.Job.FromString(newer))
