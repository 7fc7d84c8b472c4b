"""A base GGUF from a Hugging Face folder.

For the families in `families`, keys and tensors are those of llama.cpp's convert_hf_to_gguf.py, except where that file
would not serve the model that clients train. The first is of all of them:

- `tokenizer.ggml.add_bos_token` is always written; the script leaves it out where the tokenizer's files say nothing,
  and llama.cpp then adds a BOS for some tokenizers that have none.
- A tied model's `lm_head.weight` is left out, as transformers leaves it out; the script writes it when a file has one.
- Without an output type the checkpoint's own is kept; the script makes float32 into float16.
- A SentencePiece-style tokenizer.json without tokenizer.model gets scores from its merges; the script gives every
  token the same score, with which llama.cpp does not merge in the tokenizer's order, and fails for Gemma and Phi-3.
- `tokenizer.ggml.add_space_prefix` is false wherever the tokenizer puts no space before a text; the script says so for
  Gemma, and for Llama if tokenizer_config.json does.
- Tokens that tokenizer.json adds to a tokenizer.model count where tokenizer_config.json does not list them, as
  transformers 5 leaves it; the script passes over them, but for Phi-3. What makes an added token a control token is one
  rule in all families; the script has another for Phi-3.
- Llama 3's `rope_freqs.weight` is worked out in float64; the script's float32 is off by up to 2e-7, relatively.
- Phi-3's attention factor follows `factor` and `attention_factor` if they are given, as transformers does.
- Gemma 2's `rope.freq_base` is written when it is not llama.cpp's own default.
- Gemma's norms are one more in GGUF; from a float16 checkpoint the script adds that in float16.
- Gemma 3's embedding keeps its unused rows, with padding tokens, where there is no tokenizer.model.
- CodeLlama's infill tokens are not written, and BOS is not turned off by a vocabulary's size (49152) alone.

The sliding windows of Mistral, Qwen2 and Phi-3 are nowhere in llama.cpp: past them its outputs are another model's.

Any other family, and any tokenizer that is not known here, is left to the script itself if it is on PATH.

Source: llama.cpp, conversion/base.py and its neighbours, at llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

from converters import architectures, other_families
from converters.architectures import Base
from converters.families import NotKnownHere
from converters.gguf import hyperparameters, tokenizer
from converters.gguf import write as gguf_write
from converters.gguf.file import Info
from converters.gguf.types import FLOATS
from converters.settings import Settings
from converters.tensors import Array
from oneround.errors import BadModel

_LEFT_OUT = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


def build(folder: Path, path: Path, dtype: str | None = None) -> None:
    """Write a base GGUF; matrices in `dtype` ("f32", "f16", "bf16"), by default the checkpoint's own, norms in float32.

    Raises:
        BadModel: the folder's files are missing, not sound, or of a family or tokenizer that is not known here.
        NotEnough: the disk is full.
    """
    if dtype not in (None, *FLOATS):
        raise BadModel(f"a base GGUF is {', '.join(FLOATS)}, not {dtype}")
    try:
        _build(architectures.describe(folder), folder, path, dtype)
    except NotKnownHere:
        if not other_families.has_script():
            raise
        other_families.convert(folder, path, dtype)


def _build(base: Base, folder: Path, path: Path, dtype: str | None) -> None:
    dtype = dtype or base.dtype
    weights = _named(base, architectures.weights(folder))

    writer = gguf.GGUFWriter(None, base.arch)
    factors = hyperparameters.add(writer, base, Settings(base.config, str(folder / "config.json"), BadModel))
    infos = [Info(name, tensor.shape, FLOATS["f32"].type) for name, tensor in factors.items()]
    infos += [Info(new, tensor.shape, FLOATS[_type(new, tensor, dtype)].type) for new, (_, tensor) in weights.items()]
    _general(writer, folder, infos)
    writer.add_file_type(FLOATS[dtype].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizer.add(writer, folder, base.vocab_size)

    def data() -> Iterator[NDArray[Any]]:
        yield from factors.values()
        for new, (old, tensor) in weights.items():
            values = architectures.as_in_gguf(base, old, tensor)
            yield values.astype(FLOATS[_type(new, tensor, dtype)].dtype, copy=False)

    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_write.write(path, _keys(writer, folder), infos, data())


def _named(base: Base, weights: dict[str, Array]) -> dict[str, tuple[str, Array]]:
    """Tensors by their name in GGUF, with the name they had."""
    named: dict[str, tuple[str, Array]] = {}
    for old, tensor in weights.items():
        if old.endswith(_LEFT_OUT) or (base.tied and old == f"{base.family.output}.weight"):
            continue
        if (
            tensor.dtype not in [float_type.dtype for float_type in FLOATS.values()]
            or tensor.ndim not in (1, 2)
            or 0 in tensor.shape
        ):
            raise BadModel(
                f"the tensor {old} is {tensor.dtype} {tensor.shape}; expected vectors and matrices of floats"
            )
        module, _, kind = old.rpartition(".")
        if kind == "bias" and not (
            module in base.linears and architectures.within_block(base, module)[1] in base.family.biases
        ):
            raise BadModel(f"the model has a bias {old}, and llama.cpp has no place for it in {base.arch}")
        new = architectures.gguf_name(base, old)
        if new in named:
            raise BadModel(f"the tensors {old} and {named[new][0]} are both {new} in GGUF")
        named[new] = old, tensor
    return named


def _type(name: str, tensor: Array, dtype: str) -> str:
    """llama.cpp wants vectors and norms in float32, whatever the matrices are."""
    return "f32" if tensor.ndim < 2 or not name.endswith(".weight") or name.endswith("_norm.weight") else dtype


def _general(writer: gguf.GGUFWriter, folder: Path, infos: list[Info]) -> None:
    total = sum(prod(info.shape) for info in infos)
    try:
        metadata = gguf.Metadata.load(None, folder, None, total)
    except Exception as error:  # a model card may hold anything, and gguf trusts it
        raise BadModel(f"{folder}: the model card is not understood: {error}") from error
    metadata.name = metadata.name or folder.name
    metadata.size_label = metadata.size_label or gguf.size_label(total, total, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _keys(writer: gguf.GGUFWriter, folder: Path) -> dict[str, bytes]:
    try:
        return gguf_write.keys_of(writer)
    except OverflowError as error:
        raise BadModel(f"{folder}: a number is too large for a GGUF file: {error}") from error
