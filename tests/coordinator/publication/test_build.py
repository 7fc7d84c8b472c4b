"""A publication's folder: what is in it, what is not released, and bases that come quantised or in parts."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from converters import adapter, architectures, llama
from converters.adapter import Adapter, LowRank
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import quantize as gguf_quantize
from coordinator.jobs import spec as job
from coordinator.publication import cohort, verify
from coordinator.publication.build import publish
from coordinator.publication.order import BuildOrder, Candidate
from oneround.errors import BadModel
from tests.converters import tiny

BASE = Path(__file__).parents[3] / "benchmarks" / "base"


def contribution(base: Path, folder: Path, seed: int, rank: int = 2) -> Path:
    rng = np.random.default_rng(seed)
    start = adapter.initial(architectures.describe(base).linears, rank, 0)
    modules = {
        name: LowRank(update.a, rng.normal(scale=0.05, size=update.b.shape).astype(np.float32))
        for name, update in start.modules.items()
    }
    file = folder / f"client-{seed}.safetensors"
    adapter.write(Adapter(modules), file)
    return file


def order(base: Path, folder: Path, gguf: Path | None = None, **spec: Any) -> BuildOrder:
    """Of two clients of unlike rank, with 10 and 30 examples."""
    folder.mkdir(exist_ok=True)
    if gguf is None:
        gguf = folder / "base.gguf"
        gguf_base.build(base, gguf)
    files = [contribution(base, folder, seed, rank) for seed, rank in ((1, 2), (2, 3))]
    return BuildOrder(
        spec=job.parse({"name": "notes", "model": {"base": str(base)}, **spec}),
        job_id="1" * 32,
        version=1,
        reason="all 2 contributions are in",
        at_least=2,
        set_aside=[],
        base_folder=base,
        base_gguf=gguf,
        base_fingerprint="0" * 64,
        contributions=[
            Candidate(f"client-{n}", str(n) * 12, str(n) * 64, n * 20 + 10, float(n), False, "", file)
            for n, file in enumerate(files)
        ],
        folder=folder / "v1",
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("published")
    wanted = order(BASE, folder, publish={"gguf": ["bf16", "f16", "q8_0", "q4_k_m"]})
    publish(wanted, lambda stage: None)
    return wanted.folder, json.loads((wanted.folder / "manifest.json").read_text())


def test_the_manifest_lists_every_file_and_how_it_came_about(published: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = published
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    merged = {f"notes-{kind}.gguf" for kind in ("bf16", "f16", "q8_0", "q4_k_m")}
    others = {"adapter.gguf", "README.md", "Modelfile", "peft/adapter_model.safetensors", "mlx/adapters.safetensors"}
    settings = {"peft/adapter_config.json", "mlx/adapter_config.json"}
    assert files == merged | others | settings | {"manifest.json"} == {*manifest["files"], "manifest.json"}
    for name, file in manifest["files"].items():
        raw = (folder / name).read_bytes()
        assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (file["sha256"], file["size"])
    assert [given["weight"] for given in manifest["contributions"]] == [0.25, 0.75]
    assert manifest["rank"] == 5 and manifest["method"] == "exact" and manifest["energy_kept"] == 1.0
    assert manifest["base_rounding"] == 0.0 and manifest["withheld"] == {}
    assert manifest["job"]["lora"]["rank"] == 16, "defaults are written out"
    assert manifest["made_with"].keys() >= {"oneround", "gguf", "llama-cpp-python"}


def test_quantised_files_are_held_against_the_float_file(published: tuple[Path, dict[str, Any]]) -> None:
    _, manifest = published
    checked = manifest["verification"]
    assert all(verdict["passed"] for verdict in checked.values())
    assert manifest["adapter_effect"] > 10 * checked["notes-f16.gguf"]["value"]
    for kind in ("bf16", "f16"):
        assert checked[f"notes-{kind}.gguf"]["against"] == "base + adapter"
        assert checked[f"notes-{kind}.gguf"]["measure"] == "relative_logit_difference"
    for kind in ("q8_0", "q4_k_m"):
        verdict = checked[f"notes-{kind}.gguf"]
        assert (verdict["against"], verdict["measure"]) == ("f16", "mean_divergence")
        assert 0.5 < verdict["top1_agreement"] <= 1
        assert verdict["perplexity"] == pytest.approx(verdict["perplexity_against"], rel=0.5)
    assert checked["notes-q8_0.gguf"]["value"] < checked["notes-q4_k_m.gguf"]["value"]
    assert manifest["quantised"]["notes-q4_k_m.gguf"]["types"].keys() >= {"Q4_K", "Q6_K"}
    assert manifest["quantised"]["notes-q4_k_m.gguf"]["fallbacks"] == {}


def test_a_float_file_without_the_adapter_does_not_pass(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    gguf_base.build(BASE, tmp_path / "base.gguf")
    reference = verify.base_and_adapter(tmp_path / "base.gguf", published[0] / "adapter.gguf")
    base = verify.alone(tmp_path / "base.gguf", "bf16", reference.ids)
    effect = verify.difference(base.logits, reference.logits)
    assert not verify.verdict(base, reference, effect).passed
    merged = verify.alone(published[0] / "notes-bf16.gguf", "bf16", reference.ids)
    assert verify.verdict(merged, reference, effect).passed


def test_the_card_is_one_that_the_hub_reads(published: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = published
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "base" and metadata["library_name"] == "peft"
    assert {"lora", "gguf", "mlx"} <= set(metadata["tags"]) and metadata["pipeline_tag"] == "text-generation"
    for said in ("llama-server -m", "ollama create notes -f Modelfile", "mlx_lm.generate", "lms import", "peft", "40"):
        assert said in body
    for named in ("notes-q8_0.gguf", "adapter.gguf", "Modelfile"):
        assert named in body and (folder / named).exists()
    assert (folder / "Modelfile").read_text().startswith("FROM ./notes-q4_k_m.gguf\n"), "the smallest"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny.save_model(tmp_path / "model", tiny.config(tied=True))
    tiny.save_tokenizer(folder)
    return folder


def test_types_that_rows_do_not_fit_are_reported(base: Path, tmp_path: Path) -> None:
    wanted = order(base, tmp_path / "out", publish={"gguf": ["q6_k"]})
    publish(wanted, lambda stage: None)
    manifest = json.loads((wanted.folder / "manifest.json").read_text())
    fallbacks = manifest["quantised"]["notes-q6_k.gguf"]["fallbacks"]
    assert fallbacks["blk.0.attn_q.weight"] == "Q8_0", "rows of 64 do not divide into blocks of 256"
    assert "`notes-q6_k.gguf`: 22 tensors have rows" in (wanted.folder / "README.md").read_text()
    assert list(wanted.folder.glob("*.gguf")) != [] and not (wanted.folder / "notes-f16.gguf").exists()


def test_a_file_that_quantising_ruined_is_kept_aside(base: Path, tmp_path: Path) -> None:
    """A weight that is 25 times the others leaves the rest of its block of 32 no bits."""
    (file,) = base.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("v_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")):
            weight *= 4
            weight[:, ::32] *= 25
    weights["model.norm.weight"] *= 3  # as sure of itself as a trained model
    save_file(weights, file, {"format": "pt"})
    wanted = order(base, tmp_path / "out", publish={"gguf": ["f32", "q4_k_m"]})
    publish(wanted, lambda stage: None)
    manifest = json.loads((wanted.folder / "manifest.json").read_text())
    assert manifest["withheld"].keys() == {"notes-q4_k_m.gguf"}
    assert "mean divergence from f32" in manifest["withheld"]["notes-q4_k_m.gguf"]
    assert "notes-q4_k_m.gguf" not in manifest["files"] and "not released" in (wanted.folder / "README.md").read_text()
    assert (wanted.folder.with_name("v1.withheld") / "notes-q4_k_m.gguf").exists()

    alone = order(base, tmp_path / "again", publish={"gguf": ["q4_k_m"]})
    with pytest.raises(BadModel, match=r"verification failed: notes-q4_k_m.gguf: mean divergence") as raised:
        publish(alone, lambda stage: None)
    assert "q8_0" in raised.value.hint and not alone.folder.exists()


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_a_quantised_base(tmp_path: Path, kind: str) -> None:
    gguf_base.build(BASE, tmp_path / "f16.gguf", "f16")
    given = tmp_path / f"{kind}.gguf"
    gguf_quantize.quantize(tmp_path / "f16.gguf", given, kind)
    wanted = order(BASE, tmp_path / "out", given, publish={"gguf": ["f16", kind]})
    if kind == "q4_k_m":
        with pytest.raises(BadModel, match="is quantised") as raised:
            publish(wanted, lambda stage: None)
        assert "accept_quantised_gguf" in raised.value.hint
        wanted.spec.model.accept_quantised_gguf = True
    publish(wanted, lambda stage: None)
    manifest = json.loads((wanted.folder / "manifest.json").read_text())
    low, high = {"q8_0": (0.001, 0.02), "q4_k_m": (0.02, 0.2)}[kind]
    assert low < manifest["base_rounding"] < high
    assert f"off by {manifest['base_rounding']:.1%}" in (wanted.folder / "README.md").read_text()
    # The merge itself adds no loss: dequantised weights + ΔW.
    stored, made = gguf_file.read(given), gguf_file.read(wanted.folder / "notes-f16.gguf")
    name, module = "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj"
    update = sum(
        share.num_examples / 40 * adapter.read(share.file).modules[module].delta() for share in wanted.contributions
    )
    expected = gguf_file.to_float32(stored.tensors[name]) + update
    np.testing.assert_allclose(gguf_file.to_float32(made.tensors[name]), expected, rtol=2**-10, atol=1e-6)


def test_a_base_in_parts(base: Path, tmp_path: Path) -> None:
    """Parts as the gguf package writes them; any of them stands for the whole."""
    gguf_base.build(base, tmp_path / "whole.gguf", "f32")
    source = gguf.GGUFReader(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama", split_max_tensors=9)
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            items = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], items)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data.reshape(tuple(reversed(tensor.shape.tolist()))))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    whole = gguf_file.read(tmp_path / "whole.gguf")
    for part in (parts[0], parts[-1]):
        found = gguf_file.read(part)
        assert found.keys == whole.keys
        assert {n: t.data.tobytes() for n, t in found.tensors.items()} == {
            n: t.data.tobytes() for n, t in whole.tensors.items()
        }
    wanted = order(base, tmp_path / "out", parts[1], publish={"gguf": ["f32"]})
    publish(wanted, lambda stage: None)
    assert np.isfinite(llama.logits(llama.load(wanted.folder / "notes-f32.gguf", context=64), tiny.PROMPT)).all()

    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copyfile(parts[0], lone / parts[0].name)
    with pytest.raises(BadModel, match=f"one of {len(parts)} parts"):
        gguf_file.read(lone / parts[0].name)


def test_what_a_larger_cohort_found_holds_in_one_that_is_too_small_to_tell(tmp_path: Path) -> None:
    wanted = order(BASE, tmp_path)
    first, second = wanted.contributions
    for by_hand, verdict in ((False, "quarantined"), (True, "admitted")):
        doubted = replace(second, earlier="its cosine was -0.5", by_hand=by_hand)
        small = replace(wanted, contributions=[first, doubted])
        assessments = cohort.assess(small, cohort.read(small), None)
        assert [assessments[each.id].verdict for each in small.contributions] == ["admitted", verdict]
