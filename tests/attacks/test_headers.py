"""Headers and settings that claim what cannot be: errors of ours, whatever the bytes."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from converters import adapter, architectures, mlx, peft, tensors
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import sentencepiece
from oneround.errors import BadData, BadModel
from tests.attacks.damage import JUNK, mutations, survives

CODES = sorted(tensors.DTYPES)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(st.sampled_from(CODES), SHAPES), max_size=5),
    st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    st.randoms(use_true_random=False),
)
@example({"a": ("BF16", (3, 0))}, {"": ""}, None)
def test_tensors_come_back_byte_for_byte(wanted: dict[str, Any], metadata: dict[str, str], random: Any) -> None:
    wanted = {name: kind for name, kind in wanted.items() if name != "__metadata__"}
    source = {}
    for name, (code, shape) in wanted.items():
        dtype, count = tensors.DTYPES[code], int(np.prod(shape, dtype=int))
        raw = random.randbytes(count * dtype.itemsize) if random else bytes(count * dtype.itemsize)
        if code == "BOOL":
            raw = bytes(byte & 1 for byte in raw)
        source[name] = np.frombuffer(raw, dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        tensors.write(path, source, metadata)
        first = path.read_bytes()
        found, kept = tensors.read(path)
        tensors.write(path, dict(reversed(source.items())), metadata)
        assert path.read_bytes() == first
    assert kept == metadata and found.keys() == source.keys()
    for name, tensor in source.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"shape": [2]},
        [],
    ],
)
def test_safetensors_headers_that_claim_what_cannot_be(tmp_path: Path, entry: Any) -> None:
    header = json.dumps({"x.lora_A.weight": entry, "__metadata__": {"format": adapter.FORMAT}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BadData):
        adapter.read(path)


@pytest.mark.parametrize(
    ("entries", "length"),
    [
        ('"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
         '"b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}', 24),  # over each other
        ('"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
         '"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}', 16),  # one name twice
        ('"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', 16),  # bytes that are nobody's
        ('"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}', 12),  # a hole
        ('"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}', 8),  # a shape of another size
        ('"a": {"dtype": "I4", "shape": [2], "data_offsets": [0, 8]}', 8),
        ('"__metadata__": {"format": 3}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', 8),
    ],
)  # fmt: skip
def test_safetensors_that_do_not_add_up(tmp_path: Path, entries: str, length: int) -> None:
    header = ("{" + entries + "}").encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(length))
    with pytest.raises(BadData):
        tensors.read(path)


@pytest.mark.parametrize(
    ("shapes", "offsets", "said"),
    [
        ([8, 8], [0, 0], "lies over another"),
        ([16, 8], [0, 32], "lies over another"),
        ([8, 8], [64, 0], None),
        ([8, 8], [0, 4096], "outside the file"),
        ([8, 8], [0, 33], "outside the file"),
    ],
)
def test_gguf_tensors_over_each_other(tmp_path: Path, shapes: list[int], offsets: list[int], said: str | None) -> None:
    header = struct.pack("<IIQQ", 0x46554747, 3, len(shapes), 0)
    for n, (size, offset) in enumerate(zip(shapes, offsets, strict=True)):
        header += struct.pack("<Q", 1) + str(n).encode() + struct.pack("<IQIQ", 1, size, 0, offset)
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(96))
    if said is None:
        assert list(gguf_file.read(path).tensors) == ["0", "1"]
    else:
        with pytest.raises(BadModel, match=said):
            gguf_file.read(path)


def test_gguf_lengths_that_cannot_be_end_at_once(tmp_path: Path) -> None:
    path, most = tmp_path / "x.gguf", 2**63
    start = struct.pack("<II", 0x46554747, 3)
    key = struct.pack("<Q", 1) + b"k"
    for body in (
        struct.pack("<QQ", 0, most),
        struct.pack("<QQ", most, 0),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", most),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 8, most),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 4, most),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQQQQIQ", 4, most, most, most, most, 0, 0),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<I", 2**31),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 8, 99, 0),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 0, 0, 0),
    ):
        path.write_bytes(start + body + bytes(64))
        with pytest.raises(BadModel):
            gguf_file.read(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_junk_in_settings_is_never_a_traceback(bases: dict[str, Path], data: st.DataObject) -> None:
    """Any value under any key of config.json, tokenizer.json, tokenizer_config.json or an adapter's settings."""
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in bases["tied"].iterdir():
            (folder / file.name).symlink_to(file)
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {"r": 2, "lora_alpha": 2}
        more = ["rope_parameters", "rope_scaling", "rank_pattern", "lora_parameters", "added_tokens_decoder"]
        key = data.draw(st.sampled_from(sorted(values) + more))
        inner = values.get(key)
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JUNK)
        else:
            values[key] = data.draw(JUNK)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(values))
        if name == "adapter_config.json":
            for weights, a, b in (
                ("adapter_model", "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"),
                ("adapters", "x.lora_a", "x.lora_b"),
            ):
                square = np.ones((2, 2), np.float32)
                tensors.write(folder / f"{weights}.safetensors", {a: square, b: square}, {})
            survives(lambda: peft.read(folder))
            survives(lambda: mlx.read(folder))
        else:
            survives(lambda: gguf_base.build(folder, folder / "x.gguf"))


def test_mutated_sentencepiece_model(stories: Path, tmp_path: Path) -> None:
    raw = (stories / "tokenizer.model").read_bytes()
    for changed in mutations(raw, len(raw), 400):
        (tmp_path / "tokenizer.model").write_bytes(changed)
        survives(lambda: list(sentencepiece.pieces(tmp_path / "tokenizer.model")))


def test_settings_files(tmp_path: Path) -> None:
    for raw in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"architectures": ["' + b"9" * 5000 + b'"]}'):
        (tmp_path / "config.json").write_bytes(raw)
        with pytest.raises(BadModel):
            architectures.describe(tmp_path)
