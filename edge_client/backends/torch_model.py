"""A base model as PyTorch trains over it: loaded by transformers, rounded if asked, its layers checkpointed or not."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from converters import checkpoint, custom_code
from edge_client.training.recipe import Setup
from oneround.errors import BadModel, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device() -> str:
    """`cuda` (ROCm goes by that name too), `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load(base: Path, setup: Setup) -> PreTrainedModel:
    """A causal language model, on the device. In evaluation mode: LoRA's dropout is the recipe's, the base's own would
    not be.

    Raises:
        BadModel: the folder holds no model that transformers can load.
        UsageError: it cannot be quantised here.
    """
    custom_code.check(base)
    logging.disable_progress_bar()
    dtype = getattr(torch, setup.precision)
    try:
        checkpoint.weights(base)  # safetensors that are beside their index, and sound
        model = AutoModelForCausalLM.from_pretrained(
            str(base),
            dtype=dtype,
            quantization_config=_quantisation(setup.bits, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # the settings are a stranger's, and over them the library raises anything
        why = str(error).partition("\n")[0] or type(error).__name__
        raise BadModel(
            f"{base} holds no model that transformers can load: {why}", hint=custom_code.hint(base)
        ) from error
    model.config.use_cache = False
    return model.eval() if setup.bits else model.to(device()).eval()


def _quantisation(bits: int, dtype: torch.dtype) -> Any:
    """How QLoRA keeps a base (arXiv 2305.14314): NF4 with quantised constants; or LLM.int8()."""
    if not bits:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("a quantised base needs bitsandbytes", hint="pip install 'oneround[quantised]'")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def set_checkpointing(body: torch.nn.Module, checkpointing: bool) -> None:
    """Whether decoder layers keep their activations or compute them again. A layer asks for it in training mode only;
    what is in it stays in evaluation mode."""
    for module in body.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing = checkpointing
            module._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
