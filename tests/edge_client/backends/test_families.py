"""The map of modules between PyTorch and MLX: for every family the same layers of the same shapes, the same logits, and
the same training; also where transformers 5 wrote the config."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import architectures, checkpoint
from edge_client import backends
from edge_client.backends import EXACT, mlx_compat
from edge_client.data.batches import Batches
from edge_client.data.tokenize import Example, windows
from tests.converters import tiny_families
from tests.edge_client import tiny
from tests.edge_client.backends.parity import both, difference, recipe_for, trained

needs_mlx = pytest.mark.skipif(backends.load("mlx").available() is not None, reason="needs mlx")

# Where mlx-lm computes something else, see edge_client/backends/mlx_compat.py. With this a model is outside of the gap.
OUTSIDE: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 64},
    "gemma3-untied": {"final_logit_softcapping": None},
    "phi-4-mini": {"original_max_position_embeddings": 2},
}
INSIDE: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"sliding_window": 8}),
    ("mistral", {"sliding_window": 8}),
    ("phi-3", {"sliding_window": 8}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
    ("phi-4-mini", {"original_max_position_embeddings": 64}),
    ("gemma3-untied", {"final_logit_softcapping": 5.0}),
]


@pytest.fixture(scope="module", params=tiny_families.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = OUTSIDE.get(request.param, {})
    return tiny_families.save(tmp_path_factory.mktemp("families") / request.param, request.param, **more)


def of_a_job(folder: Path) -> dict[str, tuple[int, int]]:
    """What a job with `all-linear` adapts."""
    shapes = architectures.adapted(architectures.describe(folder), ["all-linear"])
    return {name: tuple(shape) for name, shape in shapes.items()}


def test_a_jobs_modules_are_those_that_peft_adapts(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    shapes = {name: tuple(layer.weight.shape) for name, layer in linears.items()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert of_a_job(folder) == {name: shapes[name] for name in names}
    assert "lm_head" in shapes and "lm_head" not in names


@needs_mlx
def test_a_jobs_modules_are_mlx_lms(folder: Path) -> None:
    import mlx.nn as nn

    from edge_client.backends import mlx_model

    linears = {name: m for name, m in mlx_model.load(folder, EXACT).named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: tuple(layer.weight.shape) for name, layer in linears.items() if name != "lm_head"}
    assert of_a_job(folder) == shapes


@needs_mlx
def test_logits(folder: Path) -> None:
    import mlx.core as mx

    from edge_client.backends import mlx_model

    found = np.array(mlx_model.load(folder, EXACT)(mx.array([tiny_families.PROMPT])))[0]
    expected = tiny_families.torch_logits(folder)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert mlx_compat.gap(checkpoint.config(folder), [len(tiny_families.PROMPT)]) == ""


@both
@pytest.mark.parametrize(("kind", "more"), INSIDE, ids=[kind for kind, _ in INSIDE])
def test_what_mlx_lm_computes_otherwise_is_refused(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    import mlx.core as mx

    from edge_client.backends import mlx_model

    folder = tiny_families.save(tmp_path / kind, kind, **more)
    found = np.array(mlx_model.load(folder, EXACT)(mx.array([tiny_families.PROMPT])))[0]
    expected = tiny_families.torch_logits(folder)
    assert np.abs(found - expected).max() > 0.05 * np.abs(expected).max(), "mlx-lm has closed the gap: take it out"
    prompt = len(tiny_families.PROMPT)
    plan = Batches([*windows(range(3), 3), *windows(range(prompt), prompt)], 1, 1, 0)
    assert plan.lengths == [3, prompt]
    assert backends.load("mlx").incompatible(folder, plan).startswith("mlx-lm computes something else")
    assert backends.load("torch").incompatible(folder, plan) == ""


def test_a_window_that_is_null_is_none(tmp_path: Path) -> None:
    """As in Mistral 7B since v0.2; where the key is missing, it is transformers' default."""
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "sliding_window": null}')
    assert mlx_compat.gap(checkpoint.config(tmp_path), [5000]) == ""
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    assert mlx_compat.gap(checkpoint.config(tmp_path), [4097]) == ""
    assert "more than 4096 tokens" in mlx_compat.gap(checkpoint.config(tmp_path), [4098])


@both
def test_training(folder: Path) -> None:
    """Five steps in float32: the same losses, the same update."""
    examples = [Example(each.ids * 5 + 3, each.is_target) for each in tiny.examples(20, seed=4)]  # beyond tiny's 61 ids
    plan = Batches(examples, batch_size=4, epochs=1, seed=3)
    assert all(backends.load(name).incompatible(folder, plan) == "" for name in ("torch", "mlx"))
    initial = tiny.nonzero(dict(architectures.describe(folder).linears), ranks=(4, 2, 3))
    recipe = recipe_for(plan)
    (torch_losses, by_torch), (mlx_losses, by_mlx) = (
        trained(name, folder, initial, recipe, plan) for name in ("torch", "mlx")
    )
    assert np.abs(torch_losses - mlx_losses).max() < 1e-4
    for name, start in initial.modules.items():
        moved = [result.modules[name].delta() - start.delta() for result in (by_torch, by_mlx)]
        size = np.linalg.norm(moved[0])
        assert size > 0 and np.linalg.norm(moved[0] - moved[1]) < 0.01 * size, f"{name} is trained, and the same way"
    assert difference(by_torch, by_mlx) < 1e-3
