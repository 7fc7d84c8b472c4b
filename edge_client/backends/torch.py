"""Training with PyTorch, transformers and PEFT: on CUDA, ROCm, MPS or the CPU."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converters import checkpoint, custom_code
from converters.adapter import Adapter
from edge_client.backends import EXACT, Progress, Setup, too_little_memory
from edge_client.data.batches import Batches
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot
from oneround.errors import BadModel, UsageError

name = "torch"
_missing: str | None = None
try:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.utils import logging

    from edge_client.backends import torch_lora
    from edge_client.backends.torch_loss import TargetLoss
except ImportError as error:
    _missing = str(error)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def available() -> str | None:
    return _missing


def device() -> str:
    """`cuda` (ROCm goes by that name too), `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def precision() -> str:
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available():
        has = int(platform.mac_ver()[0].partition(".")[0] or 0) >= 14  # Metal has no bfloat16 before
    else:
        has = bool(torch.cpu.get_capabilities().get("avx512_bf16")) if hasattr(torch.cpu, "get_capabilities") else False
    return "bfloat16" if has else "float32"


def train(
    base: Path,
    initial: Adapter,
    recipe: Recipe,
    plan: Batches,
    on_step: Callable[[Progress], None],
    snapshot: Snapshot | None = None,
    setup: Setup = EXACT,
) -> Adapter:
    model = _model(base, setup)
    layers = torch_lora.adapt(model, initial, recipe)
    loss = TargetLoss(model)
    _checkpoint(loss.body, setup.checkpointing)
    trained = [weight for _, weight in torch_lora.weights(layers)]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    if snapshot is not None:
        _go_on(layers, optimizer, snapshot)
    arrays = partial(_arrays, layers, optimizer)
    for step in range(snapshot.step if snapshot else 0, plan.total_steps):
        began = time.perf_counter()
        batch = plan.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        while True:
            torch.manual_seed(recipe.dropout_seed(step))
            try:
                total = sum(loss.backward(part, batch.num_targets) for part in batch.split(setup.parts))
                break
            except (RuntimeError, MemoryError) as error:
                optimizer.zero_grad()
                setup = _smaller(setup, len(batch.inputs), error)
                _checkpoint(loss.body, setup.checkpointing)
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss_now = float(total)
        seconds = time.perf_counter() - began
        on_step(Progress(step + 1, plan.total_steps, loss_now, batch.num_targets, seconds, setup, arrays))
    return Adapter(
        {name: torch_lora.factors(layer, recipe.scaling(initial.modules[name].rank)) for name, layer in layers.items()}
    )


def _smaller(setup: Setup, batch_size: int, error: RuntimeError | MemoryError) -> Setup:
    """The next smaller setup, if it is memory that failed; raises the error if not."""
    # Only CUDA has a type of its own for it; MPS says "out of memory", the CPU's allocator "can't allocate memory".
    kinds = (torch.OutOfMemoryError, MemoryError)
    if not isinstance(error, kinds) and not any(words in str(error) for words in ("out of memory", "allocate memory")):
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = setup.smaller(batch_size)
    if found is None:
        raise too_little_memory() from error
    return found


def _model(base: Path, setup: Setup) -> PreTrainedModel:
    """The base, on the device. In evaluation mode: LoRA's dropout is the recipe's, the base's own would not be."""
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


def _checkpoint(body: torch.nn.Module, wanted: bool) -> None:
    """Whether decoder layers keep their activations or compute them again. A layer asks for it in training mode only;
    what is in it stays in evaluation mode."""
    for module in body.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing = wanted
            module._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def _arrays(layers: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, NDArray[np.float32]]:
    found = {}
    for name, weight in torch_lora.weights(layers):
        moments = optimizer.state[weight]
        for key, tensor in (
            (name, weight.detach()),
            (f"{name}.first", moments["exp_avg"]),
            (f"{name}.second", moments["exp_avg_sq"]),
        ):
            found[key] = tensor.to("cpu", copy=True).numpy()
    return found


def _go_on(layers: dict[str, Any], optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    for name, weight in torch_lora.weights(layers):
        kept, first, second = (
            torch.tensor(snapshot.arrays[key], device=weight.device)
            for key in (name, f"{name}.first", f"{name}.second")
        )
        with torch.no_grad():
            weight.copy_(kept)
        optimizer.state[weight] = {
            "step": torch.tensor(float(snapshot.step)),
            "exp_avg": first,
            "exp_avg_sq": second,
        }
