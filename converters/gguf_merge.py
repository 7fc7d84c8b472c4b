"""An adapter merged into a base GGUF, and quantised copies of the result.

Merging into the base keeps every key and every other tensor as they are, so the tokenizer, rope factors and chat
template need no code, and memory is one tensor. It equals merging in transformers and converting.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from converters import gguf_file, llama, tensors
from converters.adapter import Adapter, LowRank, Shape
from converters.architectures import Base, check_fits, gguf_name, interleave
from converters.errors import BadModel, LayoutMismatch, UsageError
from converters.gguf_file import FLOATS, File, Info, Tensor

# Both from fine to coarse. A quantised type's number is its llama_ftype in llama.h.
FLOAT_TYPES: tuple[str, ...] = tuple(FLOATS)
QUANTISED_TYPES: dict[str, int] = {"q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15}

_BY_TYPE = {known.type: known.dtype for known in FLOATS.values()}
# Matrices that llama.cpp computes with in float32 only; the list is that of conversion/base.py, prepare_tensors.
_ALWAYS_F32 = re.compile(
    r"_norm\.weight$|ffn_gate_inp(_shexp)?\.weight$|^(position_embd|token_types)\.weight$|ssm_conv1d|shortconv\.conv"
    r"|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)|altup_correct_coef|indexer\.proj"
)


def merge(base_gguf: Path, adapter: Adapter, out: Path, dtype: str, base: Base) -> None:
    """Write base + ΔW: the product and the sum in float32, rounded once to `dtype` ("f32", "bf16", "f16").

    Raises:
        BadModel: the base GGUF is not sound, or is quantised.
        LayoutMismatch: the adapter, the base GGUF and the base model are not of one kind.
        NotEnough: the disk is full.
    """
    if dtype not in FLOAT_TYPES:
        raise UsageError(f"a merged model is {', '.join(FLOAT_TYPES)}, not {dtype}")
    shapes = {name: factors.shape for name, factors in adapter.modules.items()}
    source = check_base(base_gguf, base, shapes)
    modules = {gguf_name(base, f"{name}.weight"): name for name in shapes}
    infos = [info._replace(type=_type(info, dtype)) for info, _ in source.tensors.values()]

    def data() -> Iterator[NDArray[Any]]:
        for tensor, info in zip(source.tensors.values(), infos, strict=True):
            module = modules.get(info.name)
            factors = None if module is None else adapter.modules[module]
            if factors is not None and module is not None:
                factors = LowRank(factors.a, interleave(base, module, factors.b))
            yield _converted(tensor, info.type, factors)

    keys = {**source.keys, "general.file_type": gguf_file.encode(FLOATS[dtype].file_type, GGUFValueType.UINT32)}
    gguf_file.write(out, keys, infos, data())


def check_base(base_gguf: Path, base: Base, shapes: Mapping[str, Shape]) -> File:
    """Hold a base GGUF against the model that it should be of, and against the modules that will be adapted.

    Raises:
        BadModel: it is not sound, or is quantised.
        LayoutMismatch: it is of another model, or lacks a module.
    """
    source = gguf_file.read(base_gguf)
    _check_source(base_gguf, source, base)
    check_fits(base, shapes)
    _check_targets(base_gguf, source, {gguf_name(base, f"{name}.weight"): shape for name, shape in shapes.items()})
    return source


def quantize(source: Path, out: Path, kind: str) -> dict[str, int]:
    """Quantise a float GGUF with llama.cpp; returns how many tensors there are of each type.

    Rows that do not divide into a type's blocks (256 for K-quants, 32 for q8_0) fall back to another type, which the
    counts show.

    Raises:
        UsageError: llama.cpp is not installed, or has no such type.
        BadModel: llama.cpp does not take the source; nothing is left at `out`.
    """
    if kind not in QUANTISED_TYPES:
        raise UsageError(f"a quantised model is {', '.join(QUANTISED_TYPES)}, not {kind}")
    llama.require()
    import llama_cpp

    gguf_file.read(source)  # llama.cpp can abort the process on a file that is not sound
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it has a line for every tensor
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = QUANTISED_TYPES[kind]
    with tensors.placed(out) as file:
        # It writes by the name; the file that is open here is the same one, and is synced before it is renamed.
        if llama_cpp.llama_model_quantize(str(source).encode(), file.name.encode(), parameters) != 0:
            raise BadModel(f"llama.cpp does not quantise {source} to {kind}", hint="publish f16 or q8_0 instead")
    return dict(Counter(tensor.info.type.name for tensor in gguf_file.read(out).tensors.values()))


def _converted(tensor: Tensor, to: GGMLQuantizationType, factors: LowRank | None) -> NDArray[Any]:
    """A tensor's values, plus a module's ΔW if there is one, in a float type; verbatim where nothing changes."""
    if factors is None and tensor.info.type == to:
        return tensor.data
    values = gguf_file.to_float32(tensor)
    if factors is not None:
        delta = factors.delta()
        delta += values
        values = delta
    with np.errstate(over="ignore"):  # past float16's range is Inf, as llama.cpp's own conversion has it
        return values.astype(_BY_TYPE[to], copy=False)


def _type(info: Info, dtype: str) -> GGMLQuantizationType:
    if info.type not in _BY_TYPE:
        return info.type  # integers and the like, which are no weights
    matrix = len(info.shape) > 1 and info.name.endswith(".weight") and not _ALWAYS_F32.search(info.name)
    return FLOATS[dtype].type if matrix else info.type


def _check_source(path: Path, source: File, base: Base) -> None:
    expected = {
        "general.architecture": base.arch,
        f"{base.arch}.block_count": base.n_layers,
        f"{base.arch}.attention.head_count": base.n_heads,
        f"{base.arch}.attention.head_count_kv": base.n_kv_heads,
    }
    for key, value in expected.items():
        found = source.value(key)
        if found is not None and found != value:
            raise LayoutMismatch(f"{path} has {key} = {found}, the base model has {value}")
    if source.value("general.architecture") is None:
        raise BadModel(f"{path} does not say what architecture it is")
    whole = {*_BY_TYPE, *(GGMLQuantizationType[name] for name in ("F64", "I8", "I16", "I32", "I64"))}
    for info, _ in source.tensors.values():
        if info.type not in whole:
            raise BadModel(
                f"{path} is quantised ({info.name} is {info.type.name}), and ΔW would be lost in its rounding",
                hint="give the model's F16, BF16 or F32 GGUF, and list the quantised types under publish.gguf",
            )


def _check_targets(path: Path, source: File, targets: Mapping[str, Shape]) -> None:
    for weight, shape in targets.items():
        tensor = source.tensors.get(weight)
        if tensor is None:
            raise LayoutMismatch(f"{path} has no tensor {weight}, which the adapter adapts")
        if tensor.info.shape != shape or tensor.info.type not in _BY_TYPE:
            found = f"{tensor.info.type.name} {tensor.info.shape}"
            raise LayoutMismatch(f"{path}: {weight} is {found}, the adapter is for floats {tuple(shape)}")
