"""How a machine carries a recipe out decides on rounding, memory and time, and not on what is learnt."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.adapter import Adapter
from edge_client import backends
from edge_client.backends import EXACT, Progress, Setup
from edge_client.data.batches import Batches
from edge_client.training.recipe import Recipe
from oneround.errors import NotEnough
from tests.edge_client import tiny
from tests.edge_client.backends.parity import difference, each, recipe_for, usable

needs_mlx = pytest.mark.skipif("mlx" not in usable, reason="needs mlx")
needs_torch = pytest.mark.skipif("torch" not in usable, reason="needs torch")


def trained(name: str, base: Path, recipe: Recipe, plan: Batches, setup: Setup) -> tuple[np.ndarray, Adapter, Setup]:  # type: ignore[type-arg]
    """Losses by step, the adapter, and the setup of the last step."""
    steps: list[Progress] = []
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(4, 3))
    result = backends.load(name).train(base, initial, recipe, plan, steps.append, setup=setup)
    return np.array([step.loss for step in steps]), result, steps[-1].setup


def test_smaller_and_smaller() -> None:
    ladder: list[Setup | None] = [EXACT]
    while (last := ladder[-1]) is not None:
        ladder.append(last.smaller(6))
    assert ladder == [*(replace(EXACT, parts=n) for n in (1, 2, 4, 6)), Setup(parts=6, checkpointing=True), None]


@each
@pytest.mark.parametrize("setup", [Setup(parts=3), Setup(checkpointing=True), Setup(parts=8, checkpointing=True)])
def test_parts_and_checkpointing_change_nothing(tmp_path: Path, name: str, setup: Setup) -> None:
    base = tiny.llama(tmp_path / "base", tied=True)
    plan = Batches(tiny.examples(30), batch_size=8, epochs=3, seed=3)
    recipe = recipe_for(plan)
    losses, whole, _ = trained(name, base, recipe, plan, EXACT)
    again, other, _ = trained(name, base, recipe, plan, setup)
    assert np.abs(losses - again).max() < 1e-5
    assert difference(whole, other) < 1e-4


@needs_torch
def test_checkpointing_keeps_less(tmp_path: Path) -> None:
    import torch

    base = tiny.llama(tmp_path / "base", tied=True, hidden=128, inner=192)
    plan = Batches(tiny.examples(8, lengths=(64, 64)), batch_size=8, epochs=1, seed=0)
    kept = {}
    for setup in (EXACT, Setup(checkpointing=True)):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trained("torch", base, recipe_for(plan), plan, setup)
        kept[setup.checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


@needs_torch
def test_checkpointing_draws_the_same_dropout_twice(tmp_path: Path) -> None:
    """If the second forward pass dropped other units, its gradients would be those of another function."""
    base = tiny.llama(tmp_path / "base", tied=True)
    plan = Batches(tiny.examples(32), batch_size=32, epochs=20, seed=0)
    recipe = recipe_for(plan, dropout=0.3, learning_rate=1e-2)
    (_, whole, _), (_, other, _) = (trained("torch", base, recipe, plan, s) for s in (EXACT, Setup(checkpointing=True)))
    assert difference(whole, other) < 1e-3


@needs_mlx
def test_checkpointing_draws_the_same_dropout_twice_on_mlx() -> None:
    """With units m that stay, Σ (m x w)² has the slope 2/w times itself; with others on the way back it has not."""
    import mlx.core as mx
    import mlx.nn as nn

    from edge_client.backends import mlx_model

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.dropout = mx.array(3.0), nn.Dropout(0.5)

        def __call__(self, x: mx.array) -> mx.array:
            kept: mx.array = self.dropout(x) * self.w
            return kept

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer(), Layer()]

        def __call__(self, x: mx.array) -> mx.array:
            return sum((layer(x) ** 2).sum() for layer in self.layers)

    model = Model()
    mlx_model.checkpoint_layers(model)
    x = mx.random.normal((1000,))
    for seed in range(3):
        mx.random.seed(seed)
        loss, gradients = nn.value_and_grad(model, model)(x)
        slopes = [layer["w"].item() for layer in gradients["layers"]]
        assert sum(slopes) * 3.0 / 2 == pytest.approx(loss.item(), rel=1e-5)
        assert abs(slopes[0] - slopes[1]) > 1e-3, "each layer drops units of its own"


@each
def test_bfloat16_learns_what_float32_learns(tmp_path: Path, name: str) -> None:
    base = tiny.llama(tmp_path / "base", tied=True)
    plan = Batches(tiny.examples(64), batch_size=16, epochs=8, seed=3)
    recipe = recipe_for(plan, learning_rate=1e-2)
    exact, one, _ = trained(name, base, recipe, plan, EXACT)
    rounded, other, _ = trained(name, base, recipe, plan, Setup("bfloat16"))
    assert exact[-4:].mean() < exact[:4].mean() - 0.5, "something has to be learnt"
    assert np.abs(exact - rounded).max() < 0.2
    assert np.abs(exact - rounded).mean() < 0.04
    assert 0 < difference(one, other) < 0.3


@each
@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path: Path, name: str, bits: int) -> None:
    if name == "torch":
        pytest.importorskip("bitsandbytes")
    base = tiny.llama(tmp_path / "base", tied=False, hidden=128, inner=192, kv_heads=4)
    plan = Batches(tiny.examples(64), batch_size=16, epochs=8, seed=3)
    recipe = recipe_for(plan, learning_rate=1e-2)
    exact, _, _ = trained(name, base, recipe, plan, EXACT)
    rounded, _, _ = trained(name, base, recipe, plan, Setup("bfloat16", bits=bits))
    assert 1e-4 < abs(exact[0] - rounded[0]) / exact[0] < (0.02 if bits == 8 else 0.06)
    assert rounded[-4:].mean() < rounded[:4].mean() - 0.5


@needs_torch
def test_quantising_without_what_it_takes(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", tied=False)
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from pathlib import Path\nfrom oneround.errors import UsageError\n"
        "from edge_client.backends import torch_model, Setup\n"
        f"try: torch_model.load(Path({str(base)!r}), Setup(bits=4))\nexcept UsageError as e: print(e, '|', e.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "a quantised base needs bitsandbytes | pip install 'oneround[quantised]'\n", done.stderr


OUT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from oneround.errors import NotEnough
from edge_client import backends
from edge_client.data.batches import Batches
from tests.edge_client import tiny
from tests.edge_client.backends.parity import recipe_for

base, room = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
examples = [*tiny.examples(16, lengths=(8, 8)), *tiny.examples(48, lengths=(1024, 1024))]
plan = next(p for p in (Batches(examples, 16, 1, seed) for seed in range(99)) if p.batch(0).inputs.shape[1] < 9)
seen = []

def on_step(progress):
    seen.append([progress.loss, progress.setup.parts, progress.setup.checkpointing])
    if room and len(seen) == 1:
        most = psutil.Process().memory_info().vms + room
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

initial = tiny.nonzero(tiny.modules_of(base), ranks=(4,))
try:
    backends.load("torch").train(base, initial, recipe_for(plan), plan, on_step)
except NotEnough as error:
    print(error, "|", error.hint, file=sys.stderr)
print(json.dumps(seen))
"""


def with_room(base: Path, room: int) -> list[tuple[float, int, bool]]:
    """Loss, parts, checkpointing by step of a run that gets `room` more bytes after its first, short step; 0: any."""
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(base), str(room)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return [tuple(step) for step in json.loads(done.stdout)]


@needs_torch
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on the address space that is kept")
def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", tied=True, hidden=128, inner=512)
    unlimited = with_room(base, 0)
    assert [parts for _, parts, _ in unlimited] == [1, 1, 1, 1]
    limited = with_room(base, 200 << 20)
    assert limited[0][1] == 1 and limited[1][1] > 1, limited
    assert np.allclose([loss for loss, _, _ in limited], [loss for loss, _, _ in unlimited], atol=1e-4)


@needs_torch
def test_another_failure_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    from edge_client.backends import torch

    with pytest.raises(RuntimeError, match="shapes"):
        torch._smaller(EXACT, 8, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(NotEnough):
        torch._smaller(Setup(parts=8, checkpointing=True), 8, MemoryError())
