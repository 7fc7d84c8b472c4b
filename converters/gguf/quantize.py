"""Quantised copies of a float GGUF, made by llama.cpp."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from converters import llama
from converters.gguf import file as gguf_file
from converters.gguf.types import QUANTISED
from oneround import files
from oneround.errors import BadModel, NotEnough, UsageError

_LITTLE = 16 << 20  # bytes; less than a tensor of any model that fills a disk


@dataclass(frozen=True)
class Quantised:
    """What a quantised file holds: tensors by type, and those whose rows do not divide into the type's blocks."""

    types: dict[str, int]  # type -> number of tensors
    fallbacks: dict[str, str]  # tensor -> the type that it has instead


def quantize(source: Path, out: Path, kind: str) -> Quantised:
    """Quantise a float GGUF with llama.cpp.

    Rows that do not divide into a type's blocks (256 values for K-quants, 32 for q8_0) get another type, by
    llama.cpp's rule; the result says which.

    Raises:
        UsageError: llama.cpp is not installed, or has no such type.
        BadModel: llama.cpp does not take the source; nothing is left at `out`.
        NotEnough: the disk is full.
    """
    if kind not in QUANTISED:
        raise UsageError(f"a quantised model is {', '.join(QUANTISED)}, not {kind}")
    llama.require()
    import llama_cpp

    gguf_file.read(source)  # llama.cpp can abort the process on a file that is not sound
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it has a line for every tensor
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = QUANTISED[kind].file_type
    with files.placed(out) as file:
        # It writes by the name; the file that is open here is the same one, and is synced before it is renamed.
        if llama_cpp.llama_model_quantize(str(source).encode(), file.name.encode(), parameters) != 0:
            if shutil.disk_usage(out.parent).free < _LITTLE:  # llama.cpp does not say why it failed
                raise NotEnough(f"there is no room on the disk for {out}")
            raise BadModel(f"llama.cpp does not quantise {source} to {kind}", hint="publish f16 or q8_0 instead")
    infos = [tensor.info for tensor in gguf_file.read(out).tensors.values()]
    matrices = [info for info in infos if len(info.shape) > 1 and info.type != GGMLQuantizationType.F32]
    return Quantised(
        types=dict(Counter(info.type.name for info in infos)),
        fallbacks={info.name: info.type.name for info in matrices if info.shape[-1] % QUANTISED[kind].row_block},
    )
