"""GGUF files run by llama.cpp: the one judge of what we publish. Needs `pip install 'oneround[serve]'`.

Keys and values are kept in float32: with llama.cpp's default, float16, logits of small models are off by 1e-2.
llama.cpp aborts the process on some bad files, so files that are not ours are opened in a child process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converters.gguf import file as gguf_file
from oneround.errors import BadModel, UsageError

if TYPE_CHECKING:
    from llama_cpp import Llama

Logits = NDArray[np.float32]
_F32 = 0  # GGML_TYPE_F32


def require() -> None:
    """Raises UsageError, with what to install, when llama.cpp is not here."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UsageError("llama.cpp is not installed here", hint="pip install 'oneround[serve]'")


def load(model: Path, *, adapter: Path | None = None, context: int = 512) -> Llama:
    """A model to be measured, with a GGUF adapter applied if one is given: it keeps the logits of every position.

    On the CPU, with keys and values in float32. `context` in tokens.

    Raises:
        BadModel: the file is not there, or llama.cpp does not take it.
    """
    if adapter is not None:
        gguf_file.read(adapter)
    return _open(
        model,
        lora_path=str(adapter) if adapter else None,
        n_ctx=context,
        n_batch=min(context, 512),
        logits_all=True,
        type_k=_F32,
        type_v=_F32,
    )


def load_to_talk(model: Path, *, context: int = 4096, seed: int = 0) -> Llama:
    """A model to be used: on the GPU if llama.cpp was built for one, with the model's own context up to `context`.

    Raises:
        BadModel: the file is not there, or llama.cpp does not take it.
    """
    # To llama-cpp-python a seed of 0 means a random one.
    header = gguf_file.read(model)
    own = header.value(f"{header.value('general.architecture')}.context_length")
    return _open(model, n_ctx=min(int(own or context), context), n_gpu_layers=-1, seed=seed + 1)


def _open(model: Path, **options: Any) -> Llama:
    require()
    from llama_cpp import Llama

    class Plain(Llama):  # type: ignore[misc]
        """Llama without the repacked weights (`use_extra_bufts`), which its constructor does not offer: with them
        quantised models crash on some processors with AMX (ggml-org/llama.cpp issue 20824)."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "model_params":
                value.use_extra_bufts = False
            super().__setattr__(name, value)

    gguf_file.read(model)  # llama.cpp can abort the process on a file that is not sound
    try:
        return Plain(model_path=str(gguf_file.parts(model)[0]), verbose=False, **options)
    except (ValueError, RuntimeError) as error:
        raise BadModel(f"llama.cpp does not load {model}: {error}") from error


def logits(model: Llama, ids: Sequence[int]) -> Logits:
    """Next-token logits after each of `ids`: (len(ids), vocab), float32. At most the model's context."""
    model.reset()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)], dtype=np.float32)


def log_softmax(scores: Logits) -> Logits:
    """Log-probabilities over the last axis."""
    shifted: Logits = scores - scores.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
