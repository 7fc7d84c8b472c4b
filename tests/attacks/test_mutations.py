"""Every format that is read, damaged in every way that is cheap to think of."""

from __future__ import annotations

import collections
import io
import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from rich.console import Console

from converters import adapter, architectures, inspection, mlx, peft, report, tensors
from converters.adapter import Adapter, LowRank
from converters.formats import recognise
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import sentencepiece
from converters.gguf.file import FLOATS
from oneround.errors import OneroundError
from tests.attacks.damage import mutations

FEW, MANY = 300, 10_000


class Format(NamedTuple):
    """A folder, the file in it that is damaged, how much of it describes the rest, and a reader of the folder."""

    folder: Path
    file: str
    header: int
    read: Callable[[Path], None]


def touch(read: Adapter) -> None:
    """Use everything that was read."""
    for update in read.modules.values():
        assert update.a.shape[0] == update.b.shape[1] == update.rank


def read_gguf(path: Path) -> None:
    file = gguf_file.read(path)
    for key in file.keys:
        file.value(key)
    file.token("tokenizer.ggml.bos_token_id")
    for tensor in file.tensors.values():
        if tensor.info.type in {known.type for known in FLOATS.values()}:
            gguf_file.to_float32(tensor)


def read_safetensors(path: Path) -> None:
    for tensor in tensors.read(path)[0].values():
        tensor.tobytes()


@pytest.fixture(scope="module")
def formats(bases: dict[str, Path], stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    folder = tmp_path_factory.mktemp("formats")
    base = architectures.describe(bases["untied"])
    update = adapter.initial({name: shape for name, shape in base.linears.items() if ".1." in name}, 2, 0)
    adapter.write(update, folder / "common.safetensors", "bfloat16")
    peft.write(update, folder / "peft", base_model="x")
    mlx.write(update, folder / "mlx", base)
    gguf_adapter.write(update, folder / "adapter.gguf", base)
    moe = replace(base, config={"model_type": "qwen2_moe", "num_experts": 4})
    one = LowRank(np.ones((2, 16), np.float32), np.ones((24, 2), np.float32))
    of_experts = {f"model.layers.1.mlp.experts.{n}.up_proj": one for n in range(4)}
    gguf_adapter.write(Adapter({**of_experts, **update.modules}), folder / "experts.gguf", moe)
    mlx.write(Adapter(of_experts), folder / "switch", moe)
    gguf_base.build(bases["tied"], folder / "base.gguf")
    shutil.copytree(folder / "peft", folder / "sharded")
    (folder / "sharded" / "adapter_model.safetensors").rename(folder / "sharded" / "part.safetensors")
    index = {"weight_map": dict.fromkeys(("one", "two"), "part.safetensors")}
    (folder / "sharded" / "adapter_model.safetensors.index.json").write_text(json.dumps(index))

    def safetensors_header(path: Path) -> int:
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")

    def gguf_header(path: Path) -> int:
        data = sum(tensor.info.nbytes for tensor in gguf_file.read(path).tensors.values())
        return max(path.stat().st_size - data, 64)

    def peft_reader(at: Path) -> None:
        touch(peft.read(at))

    def mlx_reader(at: Path) -> None:
        touch(mlx.read(at))

    def builder(at: Path) -> None:
        gguf_base.build(at, at / "out.gguf")
        read_gguf(at / "out.gguf")

    def whole(at: Path, name: str) -> int:
        return (at / name).stat().st_size

    tied, sharded = bases["tied"], folder / "sharded"
    (weights,) = (file.name for file in tied.glob("*.safetensors"))
    return {
        "safetensors": Format(
            folder,
            "common.safetensors",
            safetensors_header(folder / "common.safetensors"),
            lambda at: read_safetensors(at / "common.safetensors"),
        ),
        "common layout": Format(
            folder,
            "common.safetensors",
            safetensors_header(folder / "common.safetensors"),
            lambda at: touch(adapter.read(at / "common.safetensors")),
        ),
        "peft": Format(
            folder / "peft",
            "adapter_model.safetensors",
            safetensors_header(folder / "peft" / "adapter_model.safetensors"),
            peft_reader,
        ),
        "peft settings": Format(
            folder / "peft", "adapter_config.json", whole(folder / "peft", "adapter_config.json"), peft_reader
        ),
        "peft index": Format(
            sharded,
            "adapter_model.safetensors.index.json",
            whole(sharded, "adapter_model.safetensors.index.json"),
            peft_reader,
        ),
        "mlx": Format(
            folder / "mlx",
            "adapters.safetensors",
            safetensors_header(folder / "mlx" / "adapters.safetensors"),
            mlx_reader,
        ),
        "mlx settings": Format(
            folder / "mlx", "adapter_config.json", whole(folder / "mlx", "adapter_config.json"), mlx_reader
        ),
        "gguf": Format(folder, "base.gguf", gguf_header(folder / "base.gguf"), lambda at: read_gguf(at / "base.gguf")),
        "gguf adapter": Format(
            folder,
            "adapter.gguf",
            gguf_header(folder / "adapter.gguf"),
            lambda at: touch(gguf_adapter.read(at / "adapter.gguf", base)),
        ),
        "gguf experts": Format(
            folder,
            "experts.gguf",
            gguf_header(folder / "experts.gguf"),
            lambda at: touch(gguf_adapter.read(at / "experts.gguf", moe)),
        ),
        "mlx experts": Format(
            folder / "switch",
            "adapters.safetensors",
            safetensors_header(folder / "switch" / "adapters.safetensors"),
            mlx_reader,
        ),
        "tokenizer.model": Format(
            stories,
            "tokenizer.model",
            whole(stories, "tokenizer.model"),
            lambda at: collections.deque(sentencepiece.pieces(at / "tokenizer.model"), 0) and None,
        ),
        "checkpoint": Format(tied, weights, safetensors_header(tied / weights), builder),
        "config.json": Format(tied, "config.json", whole(tied, "config.json"), builder),
        "tokenizer.json": Format(tied, "tokenizer.json", whole(tied, "tokenizer.json"), builder),
        "tokenizer_config.json": Format(tied, "tokenizer_config.json", whole(tied, "tokenizer_config.json"), builder),
    }


def attack(formats: dict[str, Format], name: str, count: int, tmp_path: Path) -> None:
    chosen = formats[name]
    folder = tmp_path / "attacked"
    shutil.copytree(chosen.folder, folder, ignore=lambda at, names: [n for n in names if (Path(at) / n).is_dir()])
    raw = (folder / chosen.file).read_bytes()
    chosen.read(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    before = set(folder.iterdir())
    refused = 0
    tracemalloc.start()
    try:
        for changed in mutations(raw, chosen.header, count):
            (folder / chosen.file).write_bytes(changed)
            tracemalloc.reset_peak()
            try:
                chosen.read(folder)
            except OneroundError as error:
                assert str(error)
                refused += 1
            assert tracemalloc.get_traced_memory()[1] < (4 << 20) + 8 * size, "memory beyond the file's size"
    finally:
        tracemalloc.stop()
    assert refused > count / 20, "the attacks hit"
    assert {file for file in folder.iterdir() if file.name != "out.gguf"} <= before, "nothing half written is left"


NAMES_OF_FORMATS = [
    "safetensors", "common layout", "peft", "peft settings", "peft index", "mlx", "mlx settings", "gguf",
    "gguf adapter", "gguf experts", "mlx experts", "tokenizer.model", "checkpoint", "config.json", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OF_FORMATS)
def test_a_few_hundred(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    attack(formats, name, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES_OF_FORMATS)
def test_ten_thousand(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    attack(formats, name, MANY, tmp_path)


# What `adapter-convert inspect` looks at: the format attacked, and what the command is given.
INSPECTED = {
    "common layout": "common.safetensors", "peft": ".", "peft settings": ".", "peft index": ".", "mlx": ".",
    "mlx settings": ".", "mlx experts": ".", "gguf adapter": "adapter.gguf", "gguf experts": "experts.gguf",
}  # fmt: skip


def inspect(formats: dict[str, Format], name: str, count: int, tmp_path: Path) -> None:
    """Looking never fails: it tells what is wrong, in text and in JSON, and a terminal has nothing to obey."""
    chosen = formats[name]
    folder = tmp_path / "attacked"
    shutil.copytree(chosen.folder, folder, ignore=lambda at, names: [n for n in names if (Path(at) / n).is_dir()])
    raw, told = (folder / chosen.file).read_bytes(), 0
    for changed in mutations(raw, chosen.header, count):
        (folder / chosen.file).write_bytes(changed)
        said = inspection.inspect(recognise(folder / INSPECTED[name]), None, lambda done, total: None)
        told += bool(said.problems)
        json.dumps(said.as_json(), allow_nan=False)
        text = io.StringIO()
        Console(file=text, width=80).print(report.inspected(said))
        assert all(letter.isprintable() or letter == "\n" for letter in text.getvalue())
    assert told > count / 20, "the attacks hit"


@pytest.mark.parametrize("name", INSPECTED)
def test_inspecting_a_hundred(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    inspect(formats, name, 100, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", INSPECTED)
def test_inspecting_thousands(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    inspect(formats, name, MANY // 4, tmp_path)


def test_every_format_is_attacked(formats: dict[str, Format]) -> None:
    assert list(formats) == NAMES_OF_FORMATS
