"""`adapter-convert`, as people and scripts run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from converters import adapter, architectures, gguf_adapter, mlx, peft, tensors
from converters.adapter import Adapter, LowRank
from converters.cli import app
from converters.errors import BadData, LayoutMismatch, UsageError
from tests import commands
from tests.converters import tiny


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


def call(*arguments: object) -> Result:
    """Run the app here; what goes wrong is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


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
    there.mkdir()
    (there / "precious").touch()
    with pytest.raises(UsageError, match="is there already"):
        call(sources["peft"], there, "--to", "mlx", "--base", base)
    assert (there / "precious").exists()
    # What fails leaves what was there, and nothing beside it.
    other = tiny.save_model(tmp_path / "other", tiny.config(tied=True, hidden_size=32))
    with pytest.raises(LayoutMismatch):
        call(sources["peft"], there, "--to", "mlx", "--base", other, "--force")
    assert (there / "precious").exists()
    call(sources["peft"], there, "--to", "mlx", "--base", base, "--force")
    assert {file.name for file in there.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"there", "other"}


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
    ],
)
def test_usage(sources: dict[str, Path], arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(sources["peft"], *arguments)


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
    folder = tiny.save_adapter(tmp_path / "dora", base, use_dora=True)
    result = call("inspect", folder, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 5
    assert "use_dora" in said["problems"][0] and said["settings"]["use_dora"] is True
    assert any("lora_magnitude_vector" in line for line in said["tensors"])
    assert "Wrong: " in call("inspect", folder).stdout


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
