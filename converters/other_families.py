"""Models of families that are not known here: described by looking at a GGUF of them, which llama.cpp's own
convert_hf_to_gguf.py makes if it is on PATH.

What is looked for is the linear layers of the blocks: matrices of the checkpoint that the gguf package has a name for
which the GGUF has in the same shape. Whether llama.cpp interleaves the rows of one is found by comparing the data, so
it holds for quantised files too. A layer that llama.cpp stores in another form (split, fused, transposed) is none that
an adapter can be merged into, and is not found.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from converters import checkpoint, custom_code
from converters.adapter import Shape
from converters.families import Base, Family, Linear, NotKnownHere, interleaved, names_in_gguf
from converters.gguf import file as gguf_file
from converters.gguf.file import File, Tensor
from converters.gguf.types import FLOATS
from converters.settings import Settings
from converters.tensors import Array
from oneround import files
from oneround.errors import BadModel

SCRIPT = "convert_hf_to_gguf.py"
_BLOCK = re.compile(r"(?P<blocks>.+?)\.(?P<number>\d{1,4})\.(?P<inner>.+)\.weight")
_NO_LINEAR = re.compile(r"norm|ffn_gate_inp|embd")  # norms, routers and tables, as GGUF names them
# Relative squared difference of a matrix to itself, rounded: 5e-6 in bfloat16, up to 0.05 in the coarsest quantised
# types; of two that have nothing to do with each other: 2.
_SAME_FLOATS, _SAME_QUANTISED = 1e-3, 0.2
_MOST = 1 << 24


def has_script() -> bool:
    """Whether convert_hf_to_gguf.py is on PATH."""
    return shutil.which(SCRIPT) is not None


def require_script(folder: Path) -> str:
    """Where convert_hf_to_gguf.py is, for a folder that there is no other way to convert.

    Raises:
        NotKnownHere: it is not on PATH.
    """
    script = shutil.which(SCRIPT)
    if script is None:
        raise NotKnownHere(f"{folder} is not supported without a GGUF of it, and {SCRIPT} is not on PATH")
    return script


def convert(folder: Path, path: Path, dtype: str | None = None) -> None:
    """Write a base GGUF with llama.cpp's script, by default in the checkpoint's own type.

    Raises:
        BadModel: the script is not on PATH, might run code of the model's own, or fails; its last line of errors is in
            the message.
        NotEnough: the disk is full.
    """
    script = require_script(folder)
    custom_code.check(folder)
    if settings := custom_code.named(folder):
        # For some families the script trusts whatever code a folder names.
        raise BadModel(
            f"{folder / settings} names code of the model's own (auto_map), which {SCRIPT} might run",
            hint="give a GGUF of the model as model.gguf, or make it without that key from a copy of the folder",
        )
    matrix, first = next((item for item in checkpoint.weights(folder).items() if item[1].ndim == 2), ("", None))
    if first is None:
        raise BadModel(f"{folder} holds no matrix")
    dtype = dtype or checkpoint.dtype(folder, matrix, first)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.placed(path) as file:
        # It writes by the name; the file that is open here is the same one, and is synced before it is renamed.
        command = [script, str(folder.resolve()), "--outfile", str(Path(file.name).resolve()), "--outtype", dtype]
        try:
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all that it needs is in the folder
            child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=offline)
        except OSError as error:
            raise BadModel(f"{script} cannot be run: {error}") from error
        if child.returncode != 0:
            complaints = child.stderr.decode("utf-8", errors="replace").strip().splitlines() or ["no word of why"]
            raise BadModel(f"{SCRIPT} does not convert {folder}: {complaints[-1].strip()[:500]}")
        gguf_file.read(Path(file.name))


def look(folder: Path, name: str, config: Settings, path: Path) -> Base:
    """Describe the model in a folder by a GGUF of it; `name` is its class in transformers.

    Raises:
        BadModel: the GGUF is not sound or not of this model, or its architecture is not one of the gguf package's.
    """
    source = gguf_file.read(path)
    arch = source.value("general.architecture")
    if not isinstance(arch, str) or arch not in gguf.MODEL_ARCH_NAMES.values():
        raise BadModel(f"{path} is for the architecture {arch!r}, which the gguf package has no names for")
    # A name map is made for every block, so their number has to be that of a real model.
    keys = Settings(_numbers(source, arch), f"{path}: {arch}", BadModel)
    n_layers = keys.integer("block_count", high=len(source.tensors))
    n_heads = keys.integer("attention.head_count", high=1 << 14)
    n_kv_heads = keys.integer("attention.head_count_kv", n_heads, high=n_heads)
    hidden = keys.integer("embedding_length", high=1 << 20)

    weights = checkpoint.weights(folder)
    names = _names(arch, n_layers, weights)
    linears = _linears(names, weights, source)
    if not linears:
        raise BadModel(f"{path} and {folder} have no linear layer in common: the GGUF is of another model")
    blocks = {_part(module, "blocks") for module in linears}
    if len(blocks) > 1:
        raise BadModel(f"{folder} has several stacks of blocks: {', '.join(sorted(blocks))}")
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    orders: dict[str, Linear] = {}
    for module in linears:
        if (inner := _part(module, "inner")) not in orders:
            weight = f"{module}.weight"
            orders[inner] = Linear("", "", _heads(module, weights[weight], source.tensors[names[weight]], heads))
    modules = {new: old.rpartition(".")[0] for old, new in names.items()}
    embedding, norm = modules.get("token_embd.weight", ""), f"{modules.get('output_norm.weight', '')}.weight"
    first = f"{next(iter(linears))}.weight"
    return Base(
        name=name,
        family=Family(
            arch=arch,
            linears=orders,
            activations=(),
            norm_shift=_norm_shift(weights.get(norm), source.tensors.get("output_norm.weight")),
            blocks=blocks.pop(),
            embedding=embedding or Family.embedding,
            norm=norm.removesuffix(".weight"),
            output=modules.get("output.weight", Family.output),
        ),
        config=config.values,
        dtype=checkpoint.dtype(folder, first, weights[first]),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=keys.integer("attention.key_length", max(hidden // n_heads, 1), high=1 << 14),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length", 0, low=0, high=1 << 22),
        vocab_size=len(weights[f"{embedding}.weight"]) if embedding else 0,
        tied="output.weight" not in source.tensors,
        linears=linears,
    )


def _numbers(source: File, arch: str) -> dict[str, Any]:
    return {key.removeprefix(f"{arch}."): source.value(key) for key in source.keys if key.startswith(f"{arch}.")}


def _names(arch: str, n_layers: int, weights: Mapping[str, Array]) -> dict[str, str]:
    """Names in GGUF by the checkpoint's, of those that have one."""
    name_map = names_in_gguf(arch, n_layers)
    names = {name: name_map.get_name(key=name, try_suffixes=(".weight",)) for name in weights}
    return {old: new for old, new in names.items() if new is not None}


def _linears(names: Mapping[str, str], weights: Mapping[str, Array], source: File) -> dict[str, Shape]:
    """The linear layers of the blocks, in the order of the blocks."""
    linears = {}
    for old, new in names.items():
        match, tensor = _BLOCK.fullmatch(old), source.tensors.get(new)
        if match is None or tensor is None or weights[old].ndim != 2 or _NO_LINEAR.search(new):
            continue
        if new.startswith(f"blk.{match['number']}.") and weights[old].shape == tensor.info.shape:
            linears[old.removesuffix(".weight")] = Shape(*weights[old].shape)
    return dict(sorted(linears.items(), key=lambda item: int(_part(item[0], "number"))))


def _part(module: str, part: str) -> str:
    match = _BLOCK.fullmatch(f"{module}.weight")
    assert match is not None, "only such names were found"
    return match[part]


def _heads(module: str, weight: Array, stored: Tensor, heads: Mapping[str, int]) -> str:
    """The head count by which the rows of a weight are interleaved in GGUF; empty when they are not."""
    ours, theirs = weight.astype(np.float32), _values(module, stored)
    orders = {"": np.arange(len(ours))}
    orders |= {name: interleaved(len(ours), n) for name, n in heads.items() if len(ours) % (2 * n) == 0}
    with np.errstate(all="ignore"):
        size = float(np.square(ours).sum()) or 1.0
        distances = {name: float(np.square(ours[order] - theirs).sum()) / size for name, order in orders.items()}
    nearest = min(distances, key=lambda name: distances[name])
    same = _SAME_FLOATS if stored.info.type in {float_type.type for float_type in FLOATS.values()} else _SAME_QUANTISED
    if not distances[nearest] < same:  # NaN is not
        raise BadModel(
            f"{stored.info.name} in the GGUF is neither {module} of the folder nor that with its heads interleaved",
            hint="the GGUF has to be of this very model",
        )
    return nearest


def _values(module: str, stored: Tensor) -> NDArray[np.float32]:
    try:
        return gguf_file.to_float32(stored)
    except (NotImplementedError, ValueError) as error:
        raise BadModel(f"{stored.info.name}, {module}, is {stored.info.type.name}: {error}") from error


def _norm_shift(ours: Array | None, stored: Tensor | None) -> float:
    """1 where llama.cpp adds it to the weights of norms, as for Gemma."""
    if ours is None or stored is None or stored.info.shape != ours.shape:
        return 0.0
    difference = gguf_file.to_float32(stored) - ours.astype(np.float32)
    return 1.0 if np.allclose(difference, 1.0, atol=1e-2) else 0.0
