"""Families that are not known here: a GGUF that is given, or one that convert_hf_to_gguf.py makes, says what they are.

The models here are Llamas whose config.json calls them something else, so that everything that comes out can be held
to what comes out for Llama. Real other families are in test_oracle.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from converters import architectures, mlx, other_families, peft
from converters.architectures import Base
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import merge as gguf_merge
from converters.gguf import write as gguf_write
from converters.gguf.file import Info, Tensor
from coordinator.jobs import base_model as bases
from coordinator.jobs import spec as job
from oneround.errors import BadModel
from oneround.v1 import federation_pb2 as pb
from tests.clients import connected
from tests.converters import tiny, tiny_families
from tests.daemons import SPEC, contribute, running, until


class Other:
    """A Llama, its GGUF, and the same folder under another name."""

    def __init__(self, root: Path, kind: str) -> None:
        self.llama = tiny_families.save(root / "llama", kind)
        self.gguf = root / "base.gguf"
        gguf_base.build(self.llama, self.gguf)
        self.folder = tiny_families.with_config(self.llama, root / "helix", {"architectures": ["HelixForCausalLM"]})

    def job(self, given: Path | None = None) -> pb.ModelSpec:
        model = {"base": str(self.folder), "gguf": str(given or "")}
        return job.parse({"name": "helix", "model": model}).model


@pytest.fixture(scope="session", params=["llama-2", "smollm2", "qwen2", "phi-3", "gemma3"])
def other(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Other:
    return Other(tmp_path_factory.mktemp("other"), request.param)


@pytest.fixture(scope="session")
def helix(tmp_path_factory: pytest.TempPathFactory) -> Other:
    return Other(tmp_path_factory.mktemp("helix"), "llama-2")


def same(found: Base, known: Base) -> None:
    assert found.linears == known.linears
    assert architectures.checkpoint_names(found) == architectures.checkpoint_names(known)
    for module in known.linears:
        orders = architectures.row_order(found, module), architectures.row_order(known, module)
        assert np.array_equal(*orders) if orders[1] is not None else orders[0] is None, module
    for field in ("dtype", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_size", "vocab_size", "tied"):
        assert getattr(found, field) == getattr(known, field), field
    for field in ("arch", "blocks", "embedding", "output", "norm", "norm_shift"):
        assert getattr(found.family, field) == getattr(known.family, field), field
    assert architectures.adapted(found, ["o_proj"]) == architectures.adapted(known, ["o_proj"])


def test_it_is_what_the_known_family_is(other: Other) -> None:
    same(architectures.describe(other.folder, other.gguf), architectures.describe(other.llama))


def test_what_is_made_of_an_adapter_is_the_same(helix: Other, tmp_path: Path) -> None:
    adapter = peft.read(tiny.save_adapter(tmp_path / "peft", helix.llama))
    made = {}
    for name, base in (
        ("known", architectures.describe(helix.llama)),
        ("found", architectures.describe(helix.folder, helix.gguf)),
    ):
        folder = tmp_path / name
        gguf_merge.merge(helix.gguf, adapter, folder.with_suffix(".merged"), "f16", base)
        gguf_adapter.write(adapter, folder.with_suffix(".adapter"), base)
        mlx.write(adapter, folder, base)
        files = [folder.with_suffix(".merged"), folder.with_suffix(".adapter"), *sorted(folder.iterdir())]
        made[name] = [file.read_bytes() for file in files]
    assert made["known"] == made["found"] and len(made["known"]) == 4


def rewritten(source: Path, out: Path, change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]]) -> Path:
    """A copy in float32 with other values."""
    file = gguf_file.read(source)
    arrays = {name: change(name, gguf_file.to_float32(tensor)) for name, tensor in file.tensors.items()}
    infos = [Info(name, array.shape, GGMLQuantizationType.F32) for name, array in arrays.items()]
    gguf_write.write(out, file.keys, infos, arrays.values())
    return out


def quantised(source: Path, out: Path, kind: GGMLQuantizationType) -> Path:
    """A copy with every matrix quantised."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in gguf_file.read(source).tensors.items():
        if len(tensor.info.shape) == 2:
            data = gguf.quants.quantize(gguf_file.to_float32(tensor), kind)
            tensors[name] = Tensor(Info(name, tensor.info.shape, kind), data.reshape(-1))
        else:
            tensors[name] = tensor
    keys = gguf_file.read(source).keys
    gguf_write.write(out, keys, [t.info for t in tensors.values()], [t.data for t in tensors.values()])
    return out


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_quantised_gguf_tells_the_rows_too(helix: Other, tmp_path: Path, kind: str) -> None:
    given = quantised(helix.gguf, tmp_path / "base.gguf", GGMLQuantizationType[kind])
    same(architectures.describe(helix.folder, given), architectures.describe(helix.llama))


def test_a_gguf_of_another_type(helix: Other, tmp_path: Path) -> None:
    gguf_base.build(helix.llama, tmp_path / "base.gguf", "bf16")
    same(architectures.describe(helix.folder, tmp_path / "base.gguf"), architectures.describe(helix.llama))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, a: a + 0.1 * a.std() if "attn_q" in name else a, "attn_q.weight in the GGUF is neither"),
        (lambda name, a: a[::-1] if "ffn_up" in name else a, "ffn_up.weight in the GGUF is neither"),
        (lambda name, a: a * np.float32("nan") if "attn_v" in name else a, "attn_v.weight in the GGUF is neither"),
        (lambda name, a: a[:, :32] if name.startswith("blk") and a.ndim == 2 else a, "no linear layer in common"),
    ],
)
def test_a_gguf_of_another_model(
    helix: Other, tmp_path: Path, change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]], said: str
) -> None:
    with pytest.raises(BadModel, match=said):
        architectures.describe(helix.folder, rewritten(helix.gguf, tmp_path / "base.gguf", change))


@pytest.mark.parametrize("known", [True, False])
def test_the_last_norm_tells_models_apart_that_are_alike(other: Other, tmp_path: Path, known: bool) -> None:
    """As it is in GGUF, where Gemma's is one more, and whether the family is known or not."""
    changed = rewritten(other.gguf, tmp_path / "x.gguf", lambda name, a: a * 1.1 if name == "output_norm.weight" else a)
    right, wrong = other.job(other.gguf), other.job(changed)
    for spec in (right, wrong):
        spec.base = str(other.llama if known else other.folder)
    assert bases.gguf(right, bases.prepare(right, tmp_path), tmp_path) == other.gguf
    with pytest.raises(BadModel, match="other weights"):
        bases.gguf(wrong, bases.prepare(wrong, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", gguf_write.encode("helix", gguf.GGUFValueType.STRING)),
        ("general.architecture", gguf_write.encode(3, gguf.GGUFValueType.UINT32)),
        ("llama.block_count", gguf_write.encode(2**31, gguf.GGUFValueType.UINT32)),
        ("llama.block_count", gguf_write.encode([3, 3], gguf.GGUFValueType.ARRAY)),
        ("llama.attention.head_count", gguf_write.encode("four", gguf.GGUFValueType.STRING)),
        ("llama.attention.head_count", gguf_write.encode(0, gguf.GGUFValueType.UINT32)),
        ("llama.attention.head_count_kv", gguf_write.encode(True, gguf.GGUFValueType.BOOL)),
        ("llama.attention.head_count", gguf_write.encode(5, gguf.GGUFValueType.UINT32)),
        ("llama.embedding_length", None),
    ],
)
def test_keys_that_cannot_be(helix: Other, tmp_path: Path, key: str, value: bytes | None) -> None:
    source = gguf_file.read(helix.gguf)
    keys = {name: raw for name, raw in {**source.keys, key: value}.items() if raw is not None}
    infos, data = [t.info for t in source.tensors.values()], [t.data for t in source.tensors.values()]
    gguf_write.write(tmp_path / "base.gguf", keys, infos, data)
    with pytest.raises(BadModel):
        architectures.describe(helix.folder, tmp_path / "base.gguf")


def script(folder: Path, body: str) -> None:
    """A convert_hf_to_gguf.py, to be put on PATH."""
    folder.mkdir()
    file = folder / other_families.SCRIPT
    file.write_text(f"#!{sys.executable}\nimport argparse, shutil, sys\nfrom pathlib import Path\n{body}")
    file.chmod(0o755)


GOOD = """
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16"])
given = parser.parse_args()
assert given.outtype == "f32"
sys.path.insert(0, {root!r})
from converters.gguf import base
base.build(Path({llama!r}), given.outfile)
"""


def test_the_script_on_path(helix: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the GGUF while the job is prepared, once, and in the checkpoint's type."""
    script(tmp_path / "bin", GOOD.format(root=str(Path(__file__).parents[2]), llama=str(helix.llama)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    prepared = bases.prepare(helix.job(), tmp_path / "bases")
    same(prepared.base, architectures.describe(helix.llama))
    (built,) = (tmp_path / "bases").iterdir()
    assert built.read_bytes() == helix.gguf.read_bytes()
    shutil.rmtree(tmp_path / "bin")
    assert bases.gguf(helix.job(), prepared, tmp_path / "bases") == built
    same(bases.describe(helix.job(), helix.folder, prepared.fingerprint, tmp_path / "bases"), prepared.base)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('one', file=sys.stderr); sys.exit('ERROR: no such model')", "ERROR: no such model$"),
        ("sys.exit(3)", "no word of why"),
        ("", "not a sound GGUF file|cannot be read"),
        ("Path(sys.argv[3]).write_bytes(b'GGUF')", "not a sound GGUF file"),
    ],
)
def test_a_script_that_fails(
    helix: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    script(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(BadModel, match=said):
        bases.prepare(helix.job(), tmp_path / "bases")
    assert list((tmp_path / "bases").iterdir()) == []


def test_neither_names_both_ways_out(helix: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for refused in (
        lambda: bases.prepare(helix.job(), tmp_path / "bases"),
        lambda: gguf_base.build(helix.folder, tmp_path / "x.gguf"),
        lambda: architectures.describe(helix.folder),
    ):
        with pytest.raises(BadModel, match="is not supported without a GGUF of it") as raised:
            refused()
        assert "model.gguf" in raised.value.hint and "convert_hf_to_gguf.py" in raised.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_script_for_a_tokenizer_that_is_not_known(
    helix: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tiny_families.without(helix.llama, tmp_path / "base", "tokenizer.model")
    source = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**source, "model": {"type": "WordLevel", "vocab": {}}}))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(BadModel, match="kind of tokenizer") as raised:
        gguf_base.build(copy, tmp_path / "x.gguf")
    assert "convert_hf_to_gguf.py" in raised.value.hint
    script(tmp_path / "bin", GOOD.format(root=str(Path(__file__).parents[2]), llama=str(helix.llama)))
    gguf_base.build(copy, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == helix.gguf.read_bytes()


@pytest.mark.parametrize("target", ["model.gguf", "the script"])
async def test_a_whole_job(helix: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """From the job file's keys to a publication, whose merged model is that of the Llama."""
    model = {"base": str(helix.folder)}
    if target == "model.gguf":
        model["gguf"] = str(helix.gguf)
    else:
        script(tmp_path / "bin", GOOD.format(root=str(Path(__file__).parents[2]), llama=str(helix.llama)))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    state, spec = tmp_path / "state", job.parse({**SPEC, "model": model, "lora": {"rank": 2}})

    async with running(state) as (daemon, address), connected(address, state) as remote:
        await daemon.operator.submit(spec)
        await contribute(remote, tmp_path)
        await daemon.operator.close("notes")
        (publication,) = (await until(daemon)).publications
    folder = Path(publication.folder)
    mean = peft.read(folder / "peft")
    gguf_merge.merge(helix.gguf, mean, tmp_path / "expected.gguf", "f16", architectures.describe(helix.llama))
    expected, found = gguf_file.read(tmp_path / "expected.gguf"), gguf_file.read(folder / "notes-f16.gguf")
    assert expected.tensors.keys() == found.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert np.array_equal(gguf_file.to_float32(tensor), gguf_file.to_float32(found.tensors[name])), name
