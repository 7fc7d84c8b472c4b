"""What any exporter has to keep to, and its verifier with it: every test runs over the whole table.

An exporter that is added to the table is tested here without a line of its own.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import adapter, architectures
from converters.adapter import Adapter, LowRank
from converters.gguf import base as gguf_base
from converters.gguf import types as gguf_types
from coordinator.jobs import spec as jobs
from coordinator.publication import read_back, verifiers
from coordinator.publication.build import publish
from coordinator.publication.exporters import EXPORTERS
from coordinator.publication.order import BuildOrder, Candidate
from coordinator.publication.parts import Material, Part
from coordinator.publication.verifiers import VERIFIERS, Evidence, check_complete, verify_all
from oneround import files, manifest
from oneround.errors import BadData, BadModel, NotEnough, UsageError

BASE = Path(__file__).parents[3] / "benchmarks" / "base"
ROOT = Path(__file__).parents[3]


def update(seed: int, *, scale: float = 0.2, rank: int = 3) -> Adapter:
    """An update that moves the base by more than any bound; with a scale of 0 none at all."""
    rng = np.random.default_rng(seed)
    start = adapter.initial(architectures.describe(BASE).linears, rank, seed)
    return Adapter(
        {
            name: LowRank(module.a, rng.normal(scale=scale, size=module.b.shape).astype(np.float32))
            for name, module in start.modules.items()
        }
    )


def silent(stage: str) -> None:
    pass


def export_all(material: Material, folder: Path) -> list[Part]:
    folder.mkdir(parents=True)
    parts: list[Part] = []
    for exporter in EXPORTERS.values():
        parts.extend(exporter.export(material, folder, tuple(parts), silent))
    return parts


def contents(parts: Sequence[Part]) -> dict[str, bytes]:
    """Every file of some parts, by its place beside or in them."""
    return {
        file.relative_to(part.path.parent).as_posix(): file.read_bytes()
        for part in parts
        for file in (sorted(part.path.rglob("*")) if part.path.is_dir() else [part.path])
        if file.is_file()
    }


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    gguf = tmp_path_factory.mktemp("base") / "base.gguf"
    gguf_base.build(BASE, gguf)
    spec = jobs.parse({"name": "notes", "model": {"base": str(BASE)}, "publish": {"gguf": ["f16", "q8_0"]}})
    return Material(spec, update(1), architectures.describe(BASE), gguf)


@pytest.fixture(scope="module")
def exported(material: Material, tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    return export_all(material, tmp_path_factory.mktemp("exported") / "v1")


@pytest.fixture(scope="module")
def evidence(material: Material, exported: list[Part]) -> Evidence:
    return Evidence(material, exported)


@pytest.fixture(scope="module")
def exported_of_others(
    material: Material, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Material, list[Part]]]:
    """All parts, made of an update that is zero, and of another one."""
    folder = tmp_path_factory.mktemp("others")
    updates = {"zero": update(1, scale=0.0), "another": update(2)}
    made = {}
    for name, other in updates.items():
        of_other = replace(material, update=other)
        made[name] = (of_other, export_all(of_other, folder / name))
    return made


def parts_of(name: str, parts: Sequence[Part]) -> list[Part]:
    own = [part for part in parts if part.exporter == name]
    assert own, f"{name} makes something for a job that asks for everything"
    return own


def before(name: str, parts: Sequence[Part]) -> tuple[Part, ...]:
    """What an exporter is given: the parts that those before it have made."""
    earlier = list(EXPORTERS)[: list(EXPORTERS).index(name)]
    return tuple(part for part in parts if part.exporter in earlier)


@pytest.mark.parametrize("name", EXPORTERS)
def test_parts_are_there_whole_at_the_top_of_the_folder(name: str, exported: list[Part]) -> None:
    parts = parts_of(name, exported)
    assert len({part.name for part in exported}) == len(exported), "no two have one name"
    for part in parts:
        assert part.exporter == name and part.about and part.path.exists()
        inside = contents([part])
        assert inside and all(inside.values()), "no file is empty"
        assert not [file for file in inside if Path(file).name.startswith(".")], "nothing half made is left"


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_same_material_gives_the_same_bytes(
    name: str, material: Material, exported: list[Part], tmp_path: Path
) -> None:
    again = EXPORTERS[name].export(material, tmp_path, before(name, exported), silent)
    assert contents(again) == contents(parts_of(name, exported))


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_full_disk_is_told_and_leaves_nothing_half_made(
    name: str, material: Material, exported: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the last moment: when what was written has to be on the medium."""

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(NotEnough, match="no room on the disk"):
        EXPORTERS[name].export(material, tmp_path, before(name, exported), silent)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", EXPORTERS)
def test_what_is_there_already_stays_until_the_new_one_is_whole(
    name: str, material: Material, exported: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = EXPORTERS[name].export(material, tmp_path, before(name, exported), silent)
    whole = contents(parts)
    monkeypatch.setattr(files, "sync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        EXPORTERS[name].export(replace(material, update=update(3)), tmp_path, before(name, exported), silent)
    assert contents(parts) == whole


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_verifier_passes_what_the_exporter_made(name: str, exported: list[Part], evidence: Evidence) -> None:
    for part in parts_of(name, exported):
        assert VERIFIERS[name].check(part, evidence).passed


@pytest.mark.parametrize("fault", ["zero", "another"])
@pytest.mark.parametrize("name", EXPORTERS)
def test_the_verifier_rejects_a_part_that_holds_something_else(
    name: str, fault: str, exported_of_others: dict[str, tuple[Material, list[Part]]], evidence: Evidence
) -> None:
    _, parts = exported_of_others[fault]
    for part in parts_of(name, parts):
        try:
            finding = VERIFIERS[name].check(part, evidence)
        except BadData:
            continue
        assert not finding.passed and finding.sentence


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_verifier_rejects_a_part_that_is_cut_short(
    name: str, exported: list[Part], evidence: Evidence, tmp_path: Path
) -> None:
    for part in parts_of(name, exported):
        copy = replace(part, path=tmp_path / part.name)
        (shutil.copytree if part.path.is_dir() else shutil.copy)(part.path, copy.path)
        largest = max(
            (file for file in [copy.path, *copy.path.rglob("*")] if file.is_file()),
            key=lambda file: file.stat().st_size,
        )
        with largest.open("r+b") as file:
            file.truncate(largest.stat().st_size // 2)
        with pytest.raises(BadData):
            VERIFIERS[name].check(copy, evidence)


def test_everything_that_is_exported_has_a_verifier() -> None:
    assert list(VERIFIERS) == list(EXPORTERS)
    check_complete(EXPORTERS, VERIFIERS)
    with pytest.raises(LookupError, match="do not match: onnx"):
        check_complete([*EXPORTERS, "onnx"], VERIFIERS)
    with pytest.raises(LookupError, match="do not match: mlx"):
        check_complete(EXPORTERS, VERIFIERS.keys() - {"mlx"})


# ---- a publication with a fault planted in it ----


def order(folder: Path, base_gguf: Path, **publish_as: object) -> BuildOrder:
    folder.mkdir()
    adapter.write(update(1), folder / "sent.safetensors")
    return BuildOrder(
        spec=jobs.parse({"name": "notes", "model": {"base": str(BASE)}, "publish": publish_as}),
        job_id="1" * 32,
        version=1,
        reason="all 1 contributions are in",
        at_least=1,
        base_folder=BASE,
        base_gguf=base_gguf,
        base_fingerprint="0" * 64,
        contributions=[
            Candidate("anna", "a" * 12, "4" * 64, 30, 1.0, False, "", folder / "sent.safetensors"),
        ],
        set_aside=[],
        folder=folder / "v1",
    )


def test_the_manifest_lists_every_file_of_every_part_and_how_it_was_checked(material: Material, tmp_path: Path) -> None:
    wanted = order(tmp_path / "out", material.base_gguf, gguf=["f16", "q8_0"])
    stages: list[str] = []
    publish(wanted, stages.append)
    listed = manifest.open_file(wanted.folder / "manifest.json")
    there = {file.relative_to(wanted.folder).as_posix() for file in wanted.folder.rglob("*") if file.is_file()}
    assert there == {"manifest.json", *listed.files}
    assert listed.read_back.keys() == {"peft", "mlx", "adapter.gguf"}
    for check in listed.read_back.values():
        assert check.passed and check.modules == len(material.update.modules) and check.largest_difference == 0.0
    assert listed.verification.keys() == {"notes-f16.gguf", "notes-q8_0.gguf"}
    assert stages.index("reading the adapters again") < stages.index("verifying with llama.cpp")
    document = json.loads((wanted.folder / "manifest.json").read_text())
    assert document["verification"]["notes-f16.gguf"]["passed"] is True and document["started_from"] == {}


@pytest.mark.parametrize("name", EXPORTERS)
def test_nothing_that_was_tampered_with_is_released(
    name: str,
    material: Material,
    exported_of_others: dict[str, tuple[Material, list[Part]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An exporter that writes another adapter than it is given: its parts are withheld, or nothing is published."""
    exporter, (of_other, others) = EXPORTERS[name], exported_of_others["another"]

    def faulty(right: Material, folder: Path, made: Sequence[Part], report: object) -> Sequence[Part]:
        return exporter.export(of_other, folder, before(name, others), silent)

    monkeypatch.setitem(EXPORTERS, name, replace(exporter, export=faulty))
    wanted = order(tmp_path / "out", material.base_gguf, gguf=["f16", "q8_0"])
    if not VERIFIERS[name].withholds:
        with pytest.raises(BadModel, match="verification failed: ") as raised:
            publish(wanted, silent)
        assert any(part.name in str(raised.value) for part in others)
        assert not wanted.folder.exists() and wanted.beside(".failed").is_dir()
        return
    publish(wanted, silent)
    listed = manifest.open_file(wanted.folder / "manifest.json")
    bad = {part.name for part in parts_of(name, others)}
    assert listed.withheld.keys() == bad and not bad & listed.files.keys()
    assert {file.name for file in wanted.beside(".withheld").iterdir()} == bad


def test_a_float_file_that_serves_quantised_ones_is_not_released(material: Material, tmp_path: Path) -> None:
    wanted = order(tmp_path / "out", material.base_gguf, gguf=["q8_0", "q8_0"])
    publish(wanted, silent)
    listed = manifest.open_file(wanted.folder / "manifest.json")
    assert listed.verification.keys() == {"notes-q8_0.gguf"}
    assert not [
        name for name in listed.files if name.endswith(".gguf") and name not in ("notes-q8_0.gguf", "adapter.gguf")
    ]


# ---- reading back ----


def test_modules_are_compared_one_by_one() -> None:
    right = update(1)
    assert read_back.compare(right, right).largest_difference == 0.0
    for name in list(right.modules)[:2]:
        module = right.modules[name]
        off = LowRank(module.a, module.b * np.float32(1.001))
        finding = read_back.compare(Adapter({**right.modules, name: off}), right)
        assert not finding.passed and finding.largest_difference == pytest.approx(0.001, rel=1e-3)
        assert "is off the aggregated update by 0.001, over 1e-06" in finding.sentence
        nothing = LowRank(np.full_like(module.a, np.nan), module.b)
        assert not read_back.compare(Adapter({**right.modules, name: nothing}), right).passed


def test_padding_is_no_difference_and_what_is_more_than_padding_is() -> None:
    right = update(1)
    name = next(iter(right.modules))
    module = right.modules[name]
    zeros_a, zeros_b = np.zeros_like(module.a), np.zeros_like(module.b)
    padded = LowRank(np.concatenate([module.a, zeros_a]), np.concatenate([module.b, zeros_b], axis=1))
    extra = {**right.modules, name: padded, "model.layers.9.other": LowRank(zeros_a, module.b)}
    assert read_back.compare(Adapter(extra), right).passed
    more = LowRank(np.concatenate([module.a, module.a]), np.concatenate([module.b, module.b], axis=1))
    for faulty, sentence in (
        ({**right.modules, name: more}, "has more than rank 3"),
        ({**right.modules, "model.layers.9.other": module}, "model.layers.9.other is adapted, and should not be"),
        ({key: value for key, value in right.modules.items() if key != name}, f"{name} is missing"),
        ({**right.modules, name: LowRank(module.a[:2], module.b[:, :2])}, "of rank 2, and should be"),
    ):
        with pytest.raises(BadModel, match=sentence):
            read_back.compare(Adapter(faulty), right)


# ---- the one table of types ----


def test_every_type_that_a_job_may_ask_for_has_everything(material: Material, tmp_path: Path) -> None:
    """It can be made, and verified against a bound of its own."""
    spec = jobs.parse({"name": "notes", "model": {"base": str(BASE)}, "publish": {"gguf": [*gguf_types.NAMES]}})
    asked = replace(material, spec=spec)
    parts = export_all(asked, tmp_path / "v1")
    checks = verify_all(asked, parts, tmp_path / "aside", silent).file_checks
    assert checks.keys() == {f"notes-{kind}.gguf" for kind in gguf_types.NAMES}
    for kind, known in gguf_types.FLOATS.items():
        bounds = (known.logit_bound, gguf_types.FLOATS[material.base.dtype].logit_bound)
        assert 0 < checks[f"notes-{kind}.gguf"].bound <= max(bounds)
    for kind, quantised in gguf_types.QUANTISED.items():
        assert checks[f"notes-{kind}.gguf"].bound == quantised.divergence_bound


def test_the_wire_format_names_the_types_that_there_are() -> None:
    proto = (ROOT / "proto" / "oneround" / "v1" / "federation.proto").read_text()
    (line,) = [line for line in proto.splitlines() if "// Merged models:" in line]
    assert {word.strip("`,.") for word in line.split() if word.startswith("`")} == set(gguf_types.NAMES)


def test_a_type_that_is_not_in_the_table_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"publish\.gguf.* expected a list of f32, f16, bf16, q8_0"):
        jobs.parse({"name": "notes", "model": {"base": str(BASE)}, "publish": {"gguf": ["q3_k"]}})


def test_the_table_is_ordered_from_fine_to_coarse_and_knows_its_blocks() -> None:
    assert verifiers.verify.FINEST_QUANTISED == "q8_0" and verifiers.verify.COARSEST_QUANTISED == "q4_k_m"
    assert [known.row_block for known in gguf_types.QUANTISED.values()] == [32, 256, 256, 256]
    for bounds in (
        [known.logit_bound for known in gguf_types.FLOATS.values()],
        [known.divergence_bound for known in gguf_types.QUANTISED.values()],
    ):
        assert bounds == sorted(bounds)
