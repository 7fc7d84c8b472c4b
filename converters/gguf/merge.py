"""An adapter merged into a base GGUF.

Every key and every other tensor stay as they are, so the tokenizer, rope factors and chat template need no code. It
equals merging in transformers and converting, at a fraction of the cost: slabs of rows are read, summed and rounded
while they are in a core's cache, several at a time, and written in the file's order while the disk is at work. Memory
is a few slabs and the names in the adapters' headers, whatever the size of the model.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from converters import architectures, tensors
from converters.adapter import Adapter, LowRank, Shape
from converters.architectures import Base, check_fits, gguf_name, interleave
from converters.gguf import file as gguf_file
from converters.gguf import write as gguf_write
from converters.gguf.file import File, Info, Tensor
from converters.gguf.types import FLOATS
from oneround.errors import BadModel, LayoutMismatch, UsageError

_SLAB = 1 << 20  # values that a worker makes at a time
_WORKERS = min(os.cpu_count() or 1, 8)
_BY_TYPE = {float_type.type: float_type.dtype for float_type in FLOATS.values()}
_WHOLE_NUMBERS = {
    GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64")
}  # copied, whatever they say
_NEARLY_WHOLE = GGMLQuantizationType.Q8_0  # rounds a weight by 1/254 of the largest in its block at most
# Matrices that llama.cpp computes with in float32 only; the list is that of conversion/base.py, prepare_tensors.
_ALWAYS_F32 = re.compile(
    r"_norm\.weight$|ffn_gate_inp(_shexp)?\.weight$|^(position_embd|token_types)\.weight$|ssm_conv1d|shortconv\.conv"
    r"|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)|altup_correct_coef|indexer\.proj"
)


def merge(
    base_gguf: Path, adapter: Adapter, out: Path, dtype: str, base: Base, *, accept_quantised: bool = False
) -> None:
    """Write base + ΔW: the product and the sum in float32, rounded once to `dtype` ("f32", "bf16", "f16").

    Raises:
        BadModel: the base GGUF is not sound, or is quantised below q8_0 and that was not asked for.
        LayoutMismatch: the adapter, the base GGUF and the base model are not of one kind.
        NotEnough: the disk is full.
    """
    if dtype not in FLOATS:
        raise UsageError(f"a merged model is {', '.join(FLOATS)}, not {dtype}")
    source = check_base(base_gguf, base, adapter.shapes, accept_quantised=accept_quantised)
    modules = {gguf_name(base, f"{name}.weight"): name for name in adapter.modules}
    infos = [info._replace(type=_type(info, dtype)) for info, _ in source.tensors.values()]

    def slabs() -> Iterator[Callable[[], NDArray[Any]]]:
        for tensor, info in zip(source.tensors.values(), infos, strict=True):
            module = modules.get(info.name)
            update = None if module is None else adapter.modules[module]
            order = np.arange(info.shape[0]) if module is None else interleave(base, module, np.arange(info.shape[0]))
            n_rows = len(tensor.data) // tensor.info.row_bytes
            step = max(_SLAB // info.shape[-1], 1)
            for start in range(0, n_rows, step):
                yield partial(_slab, tensor, slice(start, start + step), info.type, update, order[start : start + step])

    keys = {**source.keys, "general.file_type": gguf_write.encode(FLOATS[dtype].file_type, GGUFValueType.UINT32)}
    out.parent.mkdir(parents=True, exist_ok=True)
    # The workers are the parallelism: a matrix product within one takes one core.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_WORKERS) as pool:
        gguf_write.write(out, keys, infos, _in_order(pool, slabs()))


def check_base(base_gguf: Path, base: Base, shapes: Mapping[str, Shape], *, accept_quantised: bool = False) -> File:
    """Hold a base GGUF against the model that it should be of, and against the modules that will be adapted.

    Raises:
        BadModel: it is not sound, or is quantised below q8_0 and that was not asked for.
        LayoutMismatch: it is of another model, or lacks a module.
    """
    source = gguf_file.read(base_gguf)
    _check_model(base_gguf, source, base)
    _check_types(base_gguf, source, accept_quantised)
    check_fits(base, shapes)
    _check_targets(base_gguf, source, {gguf_name(base, f"{name}.weight"): shape for name, shape in shapes.items()})
    return source


def rounding(base_gguf: Path, folder: Path, base: Base) -> float:
    """What a quantised base has lost: ‖W' − W‖ / ‖W‖ over the linear layers, W being the checkpoint's weights."""
    source, weights = gguf_file.read(base_gguf), architectures.weights(folder)
    lost = whole = 0.0
    for name, (out, into) in base.linears.items():
        tensor, weight = source.tensors[gguf_name(base, f"{name}.weight")], weights[f"{name}.weight"]
        order, step = interleave(base, name, np.arange(out)), max(_SLAB // into, 1)
        for start in range(0, out, step):
            right = weight[order[start : start + step]].astype(np.float32)
            lost += float(np.square(gguf_file.to_float32(tensor, slice(start, start + step)) - right).sum())
            whole += float(np.square(right).sum())
        tensors.forget(tensor.data)
        tensors.forget(weight)
    return float(np.sqrt(lost / whole)) if whole else 0.0


def _slab(
    tensor: Tensor, rows: slice, to: GGMLQuantizationType, update: LowRank | None, order: NDArray[np.intp]
) -> NDArray[Any]:
    """Some rows of a tensor, plus the module's ΔW if there is one, in another type; verbatim where nothing changes.

    `order` has the rows of ΔW that belong to these rows.
    """
    if update is None and tensor.info.type == to:
        return tensor.data.reshape(-1, tensor.info.row_bytes)[rows]
    values = gguf_file.to_float32(tensor, rows)
    if update is not None:
        values = update.add_to(values if values.flags.writeable else values.copy(), order)
    with np.errstate(over="ignore"):  # past float16's range is Inf, as llama.cpp's own conversion has it
        rounded = values.astype(_BY_TYPE[to], copy=False)
    tensors.forget(tensor.data)
    return rounded


def _in_order(pool: Executor, jobs: Iterable[Callable[[], NDArray[Any]]]) -> Iterator[NDArray[Any]]:
    """Results in the order of the jobs, with a few jobs at work ahead."""
    ahead: deque[Future[NDArray[Any]]] = deque()
    for job in jobs:
        ahead.append(pool.submit(job))
        if len(ahead) > 2 * _WORKERS:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _type(info: Info, dtype: str) -> GGMLQuantizationType:
    if info.type in _WHOLE_NUMBERS:
        return info.type
    if info.type not in _BY_TYPE:
        return FLOATS[dtype].type
    matrix = len(info.shape) > 1 and info.name.endswith(".weight") and not _ALWAYS_F32.search(info.name)
    return FLOATS[dtype].type if matrix else info.type


def _check_model(path: Path, source: File, base: Base) -> None:
    expected = {
        "general.architecture": base.arch,
        f"{base.arch}.block_count": base.n_layers,
        f"{base.arch}.attention.head_count": base.n_heads,
        f"{base.arch}.attention.head_count_kv": base.n_kv_heads,
    }
    for key, value in expected.items():
        actual = source.value(key)
        if actual is not None and actual != value:
            raise LayoutMismatch(f"{path} has {key} = {actual}, the base model has {value}")
    if source.value("general.architecture") is None:
        raise BadModel(f"{path} does not say what architecture it is")


def _check_types(path: Path, source: File, accept_quantised: bool) -> None:
    one_of_each = {tensor.info.type: tensor for tensor in source.tensors.values()}
    for kind, tensor in one_of_each.items():
        if kind in _WHOLE_NUMBERS or kind in _BY_TYPE:
            continue
        if kind != _NEARLY_WHOLE and not accept_quantised:
            raise BadModel(
                f"{path} is quantised ({tensor.info.name} is {kind.name}), and part of ΔW would be lost beside its"
                " rounding",
                hint="give the model's F16, BF16, F32 or Q8_0 GGUF and list quantised types under publish.gguf, or"
                " take the loss with model.accept_quantised_gguf = true",
            )
        try:
            gguf_file.to_float32(tensor, slice(0, 1))
        except NotImplementedError:
            raise BadModel(f"{path}: {tensor.info.name} is {kind.name}, which cannot be dequantised here") from None


def _check_targets(path: Path, source: File, targets: Mapping[str, Shape]) -> None:
    for weight, shape in targets.items():
        tensor = source.tensors.get(weight)
        if tensor is None:
            raise LayoutMismatch(f"{path} has no tensor {weight}, which the adapter adapts")
        if tensor.info.shape != shape or tensor.info.type in _WHOLE_NUMBERS:
            actual = f"{tensor.info.type.name} {tensor.info.shape}"
            raise LayoutMismatch(f"{path}: {weight} is {actual}, the adapter is for floats {tuple(shape)}")
