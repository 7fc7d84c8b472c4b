"""`adapter-convert`, as people and scripts run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from converters import adapter, architectures, mlx, peft, tensors
from converters.adapter import Adapter, LowRank
from converters.gguf import adapter as gguf_adapter
from oneround.errors import BadData, LayoutMismatch, UsageError
from tests import commands
from tests.converters import tiny, tiny_families
from tests.converters.cli import call


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["untied"]


@pytest.fixture(scope="module")
def sources(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter in every format."""
    folder = tmp_path_factory.mktemp("sources")
    tiny.save_adapter(folder / "peft", base, lora_alpha=10)
    update, described = peft.read(folder / "peft"), architectures.describe(base)
    adapter.write(update, folder / "canonical.safetensors")
    mlx.write(update, folder / "mlx", described)
    gguf_adapter.write(update, folder / "adapter.gguf", described)
    return {
        "peft": folder / "peft",
        "canonical": folder / "canonical.safetensors",
        "mlx": folder / "mlx",
        "gguf": folder / "adapter.gguf",
    }


def modules(path: Path, kind: str, base: Path) -> Adapter:
    described = architectures.describe(base)
    return {
        "peft": lambda: peft.read(path),
        "mlx": lambda: mlx.read(path),
        "gguf": lambda: gguf_adapter.read(path, described),
        "canonical": lambda: adapter.read(path),
    }[kind]()


@pytest.mark.parametrize("to", ["canonical", "peft", "mlx", "gguf"])
@pytest.mark.parametrize("source", ["canonical", "peft", "mlx", "gguf"])
def test_every_direction(sources: dict[str, Path], base: Path, tmp_path: Path, source: str, to: str) -> None:
    result = call(sources[source], tmp_path / "out", "--to", to, "--base", base, "--json")
    said = json.loads(result.stdout)
    assert (said["from"], said["to"], said["modules"], said["ranks"]) == (source, to, 21, [4])
    expected, found = peft.read(sources["peft"]), modules(tmp_path / "out", to, base)
    for name, update in expected.modules.items():
        assert np.array_equal(found.modules[name].delta(), update.delta())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_commands_themselves(sources: dict[str, Path], base: Path, tmp_path: Path) -> None:
    out, _ = commands.run("adapter-convert", sources["mlx"], tmp_path / "peft", "--to", "peft")
    assert "21 modules of rank 4" in out and "Next:" in out and "PeftModel" in out
    out, _ = commands.run("adapter-convert", "inspect", tmp_path / "peft")
    assert "Nothing is wrong with it." in out and "self_attn.q_proj" in out
    _, err = commands.run("adapter-convert", tmp_path / "peft", tmp_path / "x.gguf", "--to", "gguf", code=2)
    assert "--base MODEL" in err
    _, err = commands.run("adapter-convert", "inspect", tmp_path / "gone", code=5)
    assert "is not there" in err
    out, _ = commands.run("adapter-convert", "--help")
    assert "SRC DST --to" in out and "inspect" in out and "Exit codes" in out


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_stands_for_its_folder(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert call(sources["peft"] / name, tmp_path / "out.safetensors", "--to", "canonical").exit_code == 0


def test_dtype_of_the_common_layout(sources: dict[str, Path], tmp_path: Path) -> None:
    call(sources["peft"], tmp_path / "x.safetensors", "--to", "canonical", "--dtype", "bfloat16")
    found, metadata = tensors.read(tmp_path / "x.safetensors")
    assert {tensor.dtype.name for tensor in found.values()} == {"bfloat16"} and metadata["dtype"] == "bfloat16"


def test_nothing_is_overwritten_unasked(sources: dict[str, Path], base: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    call(sources["peft"], there, "--to", "peft")
    before = {file.name: file.read_bytes() for file in there.iterdir()}
    with pytest.raises(UsageError, match="is there already") as raised:
        call(sources["peft"], there, "--to", "mlx", "--base", base)
    assert "--force" in raised.value.hint
    # What fails leaves what was there, and nothing beside it.
    other = tiny.save_model(tmp_path / "other", tiny.config(tied=True, hidden_size=32))
    with pytest.raises(LayoutMismatch):
        call(sources["peft"], there, "--to", "mlx", "--base", other, "--force")
    assert {file.name: file.read_bytes() for file in there.iterdir()} == before
    call(sources["peft"], there, "--to", "mlx", "--base", base, "--force")
    assert {file.name for file in there.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"there", "other"}


def test_force_replaces_adapters_and_nothing_else(sources: dict[str, Path], base: Path, tmp_path: Path) -> None:
    call(sources["peft"], tmp_path / "there", "--to", "peft")
    (tmp_path / "there" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for dst, to, said in (
        (tmp_path / "there", "mlx", "holds more than an adapter, thesis.txt"),
        (tmp_path / "there", "gguf", "is a folder; gguf is one file, .gguf"),
        (tmp_path / "file", "peft", "is a file; peft is a folder"),
        (tmp_path / "new.gguf", "peft", "the name of a .gguf file"),
        (tmp_path / "new.safetensors", "gguf", "the name of a .safetensors file"),
    ):
        with pytest.raises(UsageError, match=said):
            call(sources["mlx"], dst, "--to", to, "--base", base, "--force")
    assert {file.name for file in tmp_path.iterdir()} == {"there", "file"}
    call(sources["mlx"], tmp_path / "file", "--to", "canonical", "--force")
    assert len(adapter.read(tmp_path / "file").modules) == 21


def test_the_source_is_not_overwritten(sources: dict[str, Path], base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "deep" / "peft"
    shutil.copytree(sources["peft"], copy)
    for dst in (copy, copy.parent):
        with pytest.raises(UsageError, match="holds what is to be converted"):
            call(copy, dst, "--to", "mlx", "--base", base, "--force")
    assert (copy / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--to", "onnx"], "expected canonical, peft, mlx, gguf"),
        (["x", "--to", "canonical", "--dtype", "int8"], "expected float32, bfloat16, float16"),
        (["x", "--to", "peft", "--dtype", "bfloat16"], "--dtype is for canonical"),
        (["x", "--to", "mlx"], "to write mlx the base model's folder is needed"),
        (["x", "--to", "peft", "--base-gguf", "x.gguf"], "goes with --base"),
    ],
)
def test_usage(sources: dict[str, Path], arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(sources["peft"], *arguments)


def changed(source: Path, folder: Path, name: str, value: float) -> Path:
    """A PEFT adapter in which one value of one factor is another."""
    shutil.copytree(source, folder)
    found = {key: np.array(tensor) for key, tensor in tensors.read(folder / "adapter_model.safetensors")[0].items()}
    found[f"base_model.model.{name}.lora_B.weight"][0, 0] = value
    tensors.write(folder / "adapter_model.safetensors", found, {})
    return folder


NAME = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("to", ["canonical", "peft", "mlx", "gguf"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
def test_what_is_not_finite_is_not_converted(
    sources: dict[str, Path], base: Path, tmp_path: Path, to: str, value: float
) -> None:
    """3e38 is finite until the scaling, 2.5, is folded into it."""
    broken = changed(sources["peft"], tmp_path / "broken", NAME, value)
    with pytest.raises(BadData, match=f"{NAME}: factor B holds NaN or Inf"):
        call(broken, tmp_path / "out", "--to", to, "--base", base)
    assert {file.name for file in tmp_path.iterdir()} == {"broken"}


def test_what_float16_cannot_hold_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    large = changed(sources["peft"], tmp_path / "large", NAME, 30_000.0)
    with pytest.raises(BadData, match=r"holds 7\.5e\+04, and float16 nothing beyond 6\.55e\+04") as raised:
        call(large, tmp_path / "x.safetensors", "--to", "canonical", "--dtype", "float16")
    assert raised.value.hint == "--dtype bfloat16"
    call(large, tmp_path / "x.safetensors", "--to", "canonical", "--dtype", "bfloat16")


def test_padding_is_told(base: Path, tmp_path: Path) -> None:
    mixed = tiny.save_adapter(tmp_path / "mixed", base, rank_pattern={"k_proj": 2})
    assert "filled up with zeros to 4" in call(mixed, tmp_path / "mlx", "--to", "mlx", "--base", base).stdout


def test_two_adapters_in_one_folder(sources: dict[str, Path], base: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(sources["peft"], both)
    shutil.copy(sources["mlx"] / "adapters.safetensors", both)
    for path in (both, both / "adapter_config.json"):
        with pytest.raises(BadData, match="holds a PEFT adapter and an mlx-lm adapter"):
            call(path, tmp_path / "out", "--to", "canonical")
    assert call(both / "adapter_model.safetensors", tmp_path / "out", "--to", "canonical").exit_code == 0
    # With PEFT's settings mlx-lm's scale would be its default, 20.
    with pytest.raises(BadData, match="the settings of a PEFT adapter"):
        call(both / "adapters.safetensors", tmp_path / "other", "--to", "canonical")


def test_files_are_known_by_their_first_bytes(sources: dict[str, Path], base: Path, tmp_path: Path) -> None:
    for source in ("canonical", "gguf"):
        shutil.copy(sources[source], tmp_path / "blob")
        said = json.loads(call("inspect", tmp_path / "blob", "--base", base, "--json").stdout)
        assert said["format"] == source and said["problems"] == []


def test_bases_that_cannot_be_used(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, base, said, hint in (
        ("unknown", tiny_families.with_config(tiny.save_model(tmp_path / "m", tiny.config(tied=True)),
                                              tmp_path / "helix", {"architectures": ["HelixForCausalLM"]}),
         "HelixForCausalLM is not supported", "--base-gguf MODEL.gguf"),
        ("gone", Path("org/model"), "org/model is not a folder", "hf download org/model --local-dir org/model"),
    ):  # fmt: skip
        with pytest.raises(BadData, match=said) as raised:
            call(sources["peft"], tmp_path / name, "--to", "mlx", "--base", base)
        assert hint in raised.value.hint


def test_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (base, tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(BadData, match="no adapter") as raised:
            call("inspect", path)
        assert "adapters.safetensors" in raised.value.hint


@pytest.mark.parametrize("source", ["canonical", "peft", "mlx", "gguf"])
def test_inspect(sources: dict[str, Path], source: str) -> None:
    said = json.loads(call("inspect", sources[source], "--json").stdout)
    assert said["format"] == source and said["problems"] == [] and said["size"] > 0
    assert {module["rank"] for module in said["modules"]} == {4}
    assert {module["scaling"] for module in said["modules"]} == {2.5 if source == "peft" else 1.0}
    assert [module["block"] for module in said["modules"]].count(1) == 7
    expected = {name: float(np.linalg.norm(u.delta())) for name, u in peft.read(sources["peft"]).modules.items()}
    norms = sorted(module["norm"] for module in said["modules"])
    assert norms == pytest.approx(sorted(expected.values()), rel=1e-5)


def test_inspecting_what_is_refused(base: Path, tmp_path: Path) -> None:
    """As far as it can be told: the factors are there, and norms without the scaling."""
    folder = tiny.save_adapter(tmp_path / "dora", base, use_dora=True, lora_alpha=8)
    result = call("inspect", folder, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 5
    assert "use_dora" in said["problems"][0] and said["settings"]["use_dora"] is True
    assert len(said["tensors"]) == 21 and all("lora_magnitude_vector" in line for line in said["tensors"])
    assert len(said["modules"]) == 21 and {module["scaling"] for module in said["modules"]} == {None}
    plain = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": False}
    whole = tensors.read(folder / "adapter_model.safetensors")[0]
    kept = {name: np.array(tensor) for name, tensor in whole.items() if "magnitude" not in name}
    tensors.write(folder / "adapter_model.safetensors", kept, {})
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    norms = {module["name"]: module["norm"] for module in said["modules"]}
    for name, update in peft.read(folder).modules.items():
        assert 2 * norms[name] == pytest.approx(float(np.linalg.norm(update.delta())), rel=1e-5)


@pytest.mark.parametrize("source", ["canonical", "peft", "mlx", "gguf"])
def test_inspecting_one_of_another_rank(sources: dict[str, Path], tmp_path: Path, source: str) -> None:
    """The reason, and everything else that is there."""
    path = tmp_path / sources[source].name
    shutil.copytree(sources[source], path) if sources[source].is_dir() else shutil.copy(sources[source], path)
    if source in ("peft", "mlx"):
        config = json.loads((path / "adapter_config.json").read_text())
        config |= {"r": 3} if source == "peft" else {"lora_parameters": {"rank": 3, "scale": 1.0}}
        (path / "adapter_config.json").write_text(json.dumps(config))
        said = "rank 3 by the settings, and 4 in the file"
    elif source == "canonical":
        found = {name: np.array(tensor) for name, tensor in tensors.read(path)[0].items()}
        found[f"{NAME}.lora_A.weight"] = found[f"{NAME}.lora_A.weight"][:3]
        tensors.write(path, found, {"format": adapter.FORMAT})
        said = "do not share a rank"
    else:
        path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_q.weight.lora_c"))
        said = "lora_c is no factor"
    result = call("inspect", path)
    assert result.exit_code == 5 and f"Wrong: {path}" in result.stdout and said in " ".join(result.stdout.split())
    assert "20 modules" in result.stdout if source in ("canonical", "gguf") else "21 modules" in result.stdout


def test_names_that_a_terminal_would_obey(sources: dict[str, Path], tmp_path: Path) -> None:
    evil = "model.\x1b]0;owned\x07[bold]\ud800.layers.0.q_proj"
    folder = tmp_path / "evil"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [evil], "base_model_name_or_path": evil}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = evil.replace("\ud800", "")
    halves = {f"base_model.model.{name}.lora_A.weight": np.ones((2, 4), np.float32)}
    for shape, code in (((4, 2), 0), ((4, 3), 5)):
        halves[f"base_model.model.{name}.lora_B.weight"] = np.ones(shape, np.float32)
        tensors.write(folder / "adapter_model.safetensors", halves, {})
        out, err = commands.run("adapter-convert", "inspect", folder, code=code)
        assert "\x1b" not in out + err and "\x07" not in out + err and "[bold]" in out
    _, err = commands.run("adapter-convert", folder, tmp_path / "out", "--to", "canonical", code=5)
    assert "\x1b" not in err and "do not share a rank" in err


def test_inspecting_an_adapter_for_another_base(sources: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", tiny.config(tied=True, hidden_size=32))
    result = call("inspect", sources["peft"], "--base", other, "--json")
    assert result.exit_code == 5 and "in the base" in json.loads(result.stdout)["problems"][0]


def test_inspecting_numbers(tmp_path: Path) -> None:
    """Not trained, not finite, and one that stands out."""
    rng = np.random.default_rng(0)

    def look(change: dict[int, float]) -> tuple[int, list[str], list[str]]:
        made = {}
        for n in range(8):
            a, b = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
            made[f"model.layers.{n}.self_attn.q_proj"] = LowRank(a, b * np.float32(change.get(n, change.get(-1, 1.0))))
        adapter.write(Adapter(made), tmp_path / "x.safetensors")
        result = call("inspect", tmp_path / "x.safetensors", "--json")
        said = json.loads(result.stdout)
        return result.exit_code, said["problems"], said["remarks"]

    assert look({}) == (0, [], [])
    assert look({-1: 0.0}) == (0, [], ["ΔW is zero everywhere: the adapter was not trained"])
    code, _, remarks = look({3: 0.0, 5: 1000.0})
    assert code == 0 and "zero in 1 of 8" in remarks[0] and "layers.5.self_attn.q_proj stands out" in remarks[1]
    code, problems, _ = look({2: float("nan")})
    assert code == 5 and problems == ["model.layers.2.self_attn.q_proj holds NaN or Inf"]
    assert "NaN" not in call("inspect", tmp_path / "x.safetensors", "--json").stdout.replace("NaN or Inf", "")
