"""Two publications against each other, from the files that they are made of."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from converters import adapter, architectures, mlx, peft
from converters.adapter import Adapter, LowRank
from coordinator.aggregate import ClientUpdate, aggregate
from coordinator.publication import diff
from oneround import stream
from oneround.errors import BadData, LayoutMismatch
from oneround.v1 import federation_pb2 as pb

BASE = Path(__file__).parents[3] / "benchmarks" / "base"
NAMES = ("anna", "[b]ben", "cora", "dan")


def update(seed: int, rank: int = 3) -> Adapter:
    rng = np.random.default_rng(seed)
    start = adapter.initial(architectures.describe(BASE).linears, rank, 0)
    return Adapter(
        {
            name: LowRank(one.a, rng.normal(scale=0.05, size=one.b.shape).astype(np.float32))
            for name, one in start.modules.items()
        }
    )


def publication(
    folder: Path, version: int, clients: Mapping[int, int], *, out: Mapping[int, str] | None = None, **changes: Any
) -> Path:
    """Of clients by number, with their num_examples; those in `out` are quarantined, for a reason."""
    out, rate, taking = out or {}, changes.pop("server_learning_rate", 1.0), {**clients}
    for n in out:
        taking.pop(n)
    cohort = [ClientUpdate(update(n), count) for n, count in taking.items()]
    mean = aggregate(cohort, pb.AggregateSpec(method="exact", server_learning_rate=rate)).adapter
    peft.write(mean, folder / "peft", base_model="base")
    mlx.write(mean, folder / "mlx", architectures.describe(BASE))
    (folder / "notes-f16.gguf").write_bytes(bytes([version]) * 1000)
    (folder / f"notes-only-{version}.gguf").write_bytes(bytes(version * 2000))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    manifest = {
        "job": {"name": "notes", "aggregate": {"method": "exact", "server_learning_rate": rate}, "lora": {"rank": 3}},
        "version": version,
        "method": "exact",
        "rank": max(mean.ranks.values()),
        "energy_kept": 1.0,
        "contributions": [
            {
                "client": NAMES[n],
                "id": f"{n:012x}",
                "digest": f"{n:064x}",
                "num_examples": count,
                "weight": count / sum(taking.values()) if n in taking else 0.0,
                "verdict": "quarantined" if n in out else "admitted",
                "reason": out.get(n, ""),
            }
            for n, count in clients.items()
        ],
        "verification": {
            "notes-f16.gguf": {
                "measure": "relative_logit_difference",
                "value": 0.001 * version,
                "bound": 0.01,
                "top1_agreement": 1.0,
                "perplexity": 10.5,
            }
        },
        "files": {
            file.relative_to(folder).as_posix(): {"sha256": stream.digest(file), "size": file.stat().st_size}
            for file in files
        },
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def printed(found: Mapping[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(diff.table(found))
    return console.export_text()


def dense(folder: Path) -> dict[str, np.ndarray]:
    return {name: one.delta().astype(np.float64) for name, one in peft.read(folder / "peft").modules.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("publications")
    old = publication(root / "v1", 1, {0: 10, 1: 10, 2: 20})
    turned = {2: "its cosine to the mean of the others is -0.41, and the least is -0.1"}
    new = publication(root / "v2", 2, {1: 15, 2: 20, 3: 45}, out=turned, server_learning_rate=1.2)
    return old, new, diff.compare(old, new)


def test_clients_that_came_went_and_changed_are_told(found: tuple[Path, Path, dict[str, Any]]) -> None:
    clients = found[2]["clients"]
    assert clients["take_part"] == [3, 2]
    by_name = {one["client"]: one for one in clients["changed"]}
    assert by_name.keys() == set(NAMES)
    assert by_name["anna"]["verdict"] == ["admitted", None] and by_name["anna"]["weight"] == [0.25, None]
    assert by_name["dan"]["num_examples"] == [None, 45] and by_name["dan"]["weight"] == [None, 0.75]
    assert by_name["cora"]["verdict"] == ["admitted", "quarantined"] and "cosine" in by_name["cora"]["reason"]
    assert by_name["[b]ben"]["weight"] == [0.25, 0.25] and by_name["[b]ben"]["num_examples"] == [10, 15]


def test_the_adapters_are_compared_as_their_dense_updates_are(found: tuple[Path, Path, dict[str, Any]]) -> None:
    old, new, result = found
    before, after = dense(old), dense(new)
    one, other = (np.concatenate([side[name].ravel() for name in sorted(side)]) for side in (before, after))
    assert result["adapter"]["relative_change"] == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one))
    assert result["adapter"]["norm"] == pytest.approx([np.linalg.norm(one), np.linalg.norm(other)], rel=1e-5)
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert result["adapter"]["cosine"] == pytest.approx(cosine, abs=1e-6)
    changes = {name: np.linalg.norm(after[name] - before[name]) / np.linalg.norm(before[name]) for name in before}
    most = sorted(changes, key=changes.__getitem__)[: -5 - 1 : -1]
    assert [module["module"] for module in result["adapter"]["modules"]] == most
    for module in result["adapter"]["modules"]:
        assert module["relative_change"] == pytest.approx(changes[module["module"]], rel=1e-5)


def test_the_method_settings_and_files_are_told(found: tuple[Path, Path, dict[str, Any]]) -> None:
    result = found[2]
    assert result["publication"] == ["notes v1", "notes v2"] and result["settings"] == {}
    assert result["mean"] == {
        "method": ["exact", "exact"],
        "server_learning_rate": [1.0, 1.2],
        "rank": [9, 6],
        "energy_kept": [1.0, 1.0],
    }
    files = result["files"]
    assert files["notes-only-1.gguf"]["size"] == [2000, None] and files["notes-only-2.gguf"]["size"] == [None, 4000]
    assert files["notes-f16.gguf"] == {
        "size": [1000, 1000],
        "measure": ["relative_logit_difference"] * 2,
        "perplexity": [10.5, 10.5],
        "value": [0.001, 0.002],
    }
    before, after = files["peft/adapter_model.safetensors"]["size"]
    assert before > after, "of three clients, and of two"
    json.dumps(result, allow_nan=False)


def test_people_read_it_in_plain_words(found: tuple[Path, Path, dict[str, Any]]) -> None:
    text = printed(found[2])
    for said in (
        "notes v1 -> notes v2",
        "exact, rank 9 -> 6, server learning rate 1 -> 1.2",
        "clients   3 -> 2",
        "[b]ben",
        "admitted -> quarantined",
        "25.0% -> –",
        "its cosine to the mean of the others is -0.41",
        "0.001 -> 0.002",
        "– -> 4.0 kB",
    ):
        assert said in text, text


def test_a_publication_differs_from_itself_in_nothing(found: tuple[Path, Path, dict[str, Any]]) -> None:
    same = diff.compare(found[0], found[0])
    assert same["clients"]["changed"] == [] and same["files"] == {} and same["settings"] == {}
    assert same["adapter"]["relative_change"] == 0.0 and same["adapter"]["cosine"] == pytest.approx(1.0)
    assert "adapter   the same" in printed(same)


def test_another_contribution_of_the_same_client_and_other_settings_are_seen(tmp_path: Path) -> None:
    old = publication(tmp_path / "v1", 1, {0: 10, 1: 10})
    contributions = json.loads((old / "manifest.json").read_text())["contributions"]
    contributions[1]["digest"] = "f" * 64
    for entry in contributions:
        del entry["id"], entry["verdict"], entry["reason"]  # as the first manifests were
    job = {"name": "notes", "aggregate": {"method": "fedavg"}, "lora": {"rank": 4}}
    new = publication(tmp_path / "v2", 1, {0: 10, 1: 10}, contributions=contributions, job=job)
    (old / "manifest.json").write_text((old / "manifest.json").read_text().replace('"id":', '"no_id":'))
    result = diff.compare(old, new)
    assert result["settings"] == {"lora.rank": [3, 4]} and result["mean"]["method"] == ["exact", "fedavg"]
    assert result["mean"]["server_learning_rate"] == [1.0, None] and result["adapter"]["relative_change"] == 0.0
    assert {one["client"]: one["digest"] for one in result["clients"]["changed"]}["[b]ben"] == [f"{1:064x}", "f" * 64]
    assert "sent another" in printed(result) and "lora.rank 3 -> 4" in printed(result)


def test_an_adapter_that_was_zero_has_no_relative_change(tmp_path: Path) -> None:
    old = publication(tmp_path / "v1", 1, {0: 10}, server_learning_rate=0.0)
    new = publication(tmp_path / "v2", 2, {0: 10})
    result = diff.compare(old, new)
    assert result["adapter"]["relative_change"] is None and result["adapter"]["cosine"] is None
    assert "nothing before" in printed(result)
    assert diff.compare(new, old)["adapter"]["relative_change"] == pytest.approx(1.0)


def test_what_is_no_publication_is_told_in_a_sentence(tmp_path: Path) -> None:
    good = publication(tmp_path / "v1", 1, {0: 10})
    with pytest.raises(BadData, match=r"nowhere/manifest\.json is not there"):
        diff.compare(good, tmp_path / "nowhere")
    bad = publication(tmp_path / "v2", 2, {0: 10})
    sound = '"job": {"name": "notes"}, "version": 2'
    for text, sentence in (
        ("{", "is not a JSON file"),
        ("[]", "is not a JSON object"),
        ("{}", "job is absent"),
        ('{"job": []}', "job is"),
        (f'{{{sound}, "contributions": [1]}}', "contributions: number 0 is 1; expected an object"),
        (f'{{{sound}, "contributions": [{{"client": 3, "weight": 1}}]}}', "client is 3; expected a string"),
        (f'{{{sound}, "files": {{"a": {{"sha256": "{"0" * 64}", "size": "large"}}}}}}', "size is 'large'"),
    ):
        (bad / "manifest.json").write_text(text)
        with pytest.raises(BadData, match=sentence):
            diff.compare(good, bad)
    (bad / "manifest.json").write_text(f"{{{sound}}}")
    assert diff.compare(good, bad)["clients"]["take_part"] == [1, 0]
    assert printed(diff.compare(good, bad))
    (bad / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(BadData, match="adapter_model"):
        diff.compare(good, bad)


def test_adapters_of_other_models_are_not_compared(tmp_path: Path) -> None:
    old, new = publication(tmp_path / "v1", 1, {0: 10}), publication(tmp_path / "v2", 2, {0: 10})
    some = dict(list(update(0).modules.items())[1:])
    peft.write(Adapter(some), new / "peft", base_model="base")
    with pytest.raises(LayoutMismatch, match=r"do not adapt the same modules, model\.layers"):
        diff.compare(old, new)


def test_parameters_are_told_of_the_methods_that_have_them(tmp_path: Path) -> None:
    folders = [publication(tmp_path / f"v{n}", n, {0: 1, 1: 1}) for n in (1, 2)]
    for folder, method, kept in ((folders[0], "krum", 1.0), (folders[1], "ties", 0.9)):
        manifest = json.loads((folder / "manifest.json").read_text())
        spec = {"method": method, "density": 0.3, "byzantine_clients": 2, "server_learning_rate": 1.0}
        manifest |= {"job": {"name": "notes", "aggregate": spec}, "method": method, "energy_kept": kept}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    found = diff.compare(*folders)
    assert found["mean"]["byzantine_clients"] == [2, None] and found["mean"]["density"] == [None, 0.3]
    assert found["settings"] == {}
    console = Console(file=io.StringIO(), width=200)
    console.print(diff.table(found))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "krum -> ties" in shown and "density – -> 0.3" in shown and "energy kept 100.0% -> 90.0%" in shown
