"""The types that a merged GGUF may have: one table for jobs, merging, quantising and verification.

A type that is added here can be asked for in a job (`publish.gguf`), made, and held to its bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True)
class FloatType:
    """A float type, as a tensor's, as NumPy's, and as a whole file's.

    `logit_bound`: how far the logits may be from base + adapter at any probe position, ‖difference‖ / ‖logits‖. f32
    differs by summation order alone; f16 and bf16 round every weight, and llama.cpp rounds what it multiplies them by,
    the more the deeper the model: 0.0075 with 4 layers in bf16, 0.022 with 22.
    """

    type: GGMLQuantizationType
    dtype: np.dtype[Any]
    file_type: int  # `general.file_type`, llama_ftype in llama.h
    logit_bound: float


@dataclass(frozen=True)
class QuantisedType:
    """A type that llama.cpp quantises to: most tensors' type, and the whole file's.

    `divergence_bound`: mean Kullback-Leibler divergence, in nats per token, from the float file that it was made from;
    and of a quantised base with its adapter from a float file, where llama.cpp rounds what it multiplies the base's
    weights by.
    """

    type: GGMLQuantizationType
    file_type: int  # `general.file_type`, llama_ftype in llama.h
    divergence_bound: float

    @property
    def row_block(self) -> int:
        """How many values of a row are rounded together; rows that do not divide into such blocks get another type."""
        return int(GGML_QUANT_SIZES[self.type][0])


# From fine to coarse.
FLOATS: Mapping[str, FloatType] = {
    "f32": FloatType(GGMLQuantizationType.F32, np.dtype(np.float32), 0, 1e-3),
    "f16": FloatType(GGMLQuantizationType.F16, np.dtype(np.float16), 1, 1e-2),
    "bf16": FloatType(GGMLQuantizationType.BF16, np.dtype(ml_dtypes.bfloat16), 32, 5e-2),
}
QUANTISED: Mapping[str, QuantisedType] = {
    "q8_0": QuantisedType(GGMLQuantizationType.Q8_0, 7, 0.02),
    "q6_k": QuantisedType(GGMLQuantizationType.Q6_K, 18, 0.05),
    "q5_k_m": QuantisedType(GGMLQuantizationType.Q5_K, 17, 0.1),
    "q4_k_m": QuantisedType(GGMLQuantizationType.Q4_K, 15, 0.25),
}
NAMES = (*FLOATS, *QUANTISED)
FINEST_QUANTISED, *_, COARSEST_QUANTISED = QUANTISED
