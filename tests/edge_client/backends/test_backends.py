"""The proof that PyTorch and MLX train the same adapter."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import adapter
from converters.adapter import Adapter, LowRank, Shape
from edge_client import backends
from edge_client.backends import Backend, Progress, Setup
from edge_client.data import tokenize
from edge_client.data.batches import Batches
from edge_client.training.snapshot import Snapshot
from oneround.errors import BadData, BadModel, LayoutMismatch, UsageError
from tests.edge_client import tiny
from tests.edge_client.backends.parity import both, difference, each, recipe_for, trained, usable

SHARED = Path(__file__).parents[4] / "shared"
STORIES = SHARED / "models" / "stories260K"
DEMO = Path(__file__).parents[3] / "benchmarks" / "base"
SHAKESPEARE = SHARED / "data" / "tinyshakespeare" / "input.txt"


def assert_parity(base: Path, initial: Adapter, plan: Batches, *, freeze_a: bool = False) -> None:
    recipe = replace(recipe_for(plan), freeze_a=freeze_a)
    (torch_losses, by_torch), (mlx_losses, by_mlx) = (
        trained(name, base, initial, recipe, plan) for name in ("torch", "mlx")
    )
    assert np.abs(torch_losses - mlx_losses).max() < 1e-4
    moved = difference(by_torch, initial)
    assert moved > 0.05, "training has to change something for agreement to mean anything"
    assert difference(by_torch, by_mlx) < 1e-3


@both
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parity_on_a_tiny_grouped_query_llama(tmp_path: Path, tied: bool) -> None:
    base = tiny.llama(tmp_path / "base", tied=tied)
    plan = Batches(tiny.examples(), batch_size=8, epochs=4, seed=3)  # 32 steps with short last batches
    assert_parity(base, tiny.nonzero(tiny.modules_of(base), ranks=(4, 2, 3)), plan)


def fifty_steps(base: Path, texts: list[str]) -> tuple[Adapter, Batches]:
    """Where training over a base begins, and batches of texts."""
    rows = [tokenize.Text("text", text) for text in texts]
    tokenised = tokenize.tokenise(rows, tokenize.load_tokenizer(base), 64)
    plan = Batches(tokenised.examples[:200], batch_size=8, epochs=2, seed=0)
    assert plan.total_steps == 50
    return adapter.initial(tiny.modules_of(base), rank=8, seed=0), plan


@both
@pytest.mark.skipif(not (STORIES.is_dir() and SHAKESPEARE.is_file()), reason=f"needs {STORIES} and {SHAKESPEARE}")
def test_parity_and_learning_on_a_real_model_and_text() -> None:
    initial, plan = fifty_steps(STORIES, SHAKESPEARE.read_text()[:60_000].split("\n\n"))
    assert_parity(STORIES, initial, plan)
    losses, _ = trained("torch", STORIES, initial, recipe_for(plan), plan)
    assert losses[-5:].mean() < losses[:5].mean() - 0.3


@both
def test_parity_on_the_demos_base() -> None:
    """On Python that it has never seen: a package that its pretraining left out."""
    import asyncio.base_events

    assert_parity(DEMO, *fifty_steps(DEMO, Path(asyncio.base_events.__file__).read_text().split("\n\n")))


@each
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    base = tiny.llama(tmp_path / "base", tied=True)
    initial = adapter.initial(tiny.modules_of(base), rank=4, seed=0)
    plan = Batches(tiny.examples(24), batch_size=8, epochs=2, seed=3)
    recipe = recipe_for(plan, dropout=0.2)
    (losses, first), (losses_again, again) = (trained(name, base, initial, recipe, plan) for _ in range(2))
    assert losses.tolist() == losses_again.tolist()
    for module, factors in first.modules.items():
        assert np.array_equal(factors.a, again.modules[module].a)
        assert np.array_equal(factors.b, again.modules[module].b)
    _, other = trained(name, base, initial, replace(recipe, seed=1), plan)
    assert difference(first, other) > 1e-3, "another seed has to draw other dropout masks"


@each
def test_without_learning_the_adapter_stays(tmp_path: Path, name: str) -> None:
    base = tiny.llama(tmp_path / "base", tied=False)
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(4, 3))
    plan = Batches(tiny.examples(8), batch_size=8, epochs=2, seed=0)
    losses, result = trained(name, base, initial, recipe_for(plan, learning_rate=0.0), plan)
    assert difference(initial, result) < 1e-6
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@each
def test_the_loss_is_that_of_the_merged_model(tmp_path: Path, name: str) -> None:
    """Folding: base plus a nonzero adapter scores as the base with B @ A added to its weights."""
    from safetensors.numpy import load_file, save_file

    base = tiny.llama(tmp_path / "base", tied=True)
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(4,))
    plan = Batches(tiny.examples(8), batch_size=8, epochs=1, seed=0)
    recipe = recipe_for(plan, learning_rate=0.0)
    with_adapter, _ = trained(name, base, initial, recipe, plan)
    weights = load_file(base / "model.safetensors")
    for module, factors in initial.modules.items():
        weights[f"{module}.weight"] += factors.delta()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    nothing = Adapter({m: LowRank(f.a, np.zeros_like(f.b)) for m, f in initial.modules.items()})
    merged, _ = trained(name, base, nothing, recipe, plan)
    assert with_adapter[0] == pytest.approx(merged[0], abs=1e-5)


@both
def test_dropout_means_the_same_in_both(tmp_path: Path) -> None:
    """Not the same masks, but the same law: over many masks the losses have the same mean and the same spread."""
    base = tiny.llama(tmp_path / "base", tied=True)
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(8,))
    plan = Batches(tiny.examples(32), batch_size=32, epochs=60, seed=0)
    recipe = recipe_for(plan, dropout=0.2, learning_rate=0.0)
    one, other = (trained(name, base, initial, recipe, plan)[0] for name in ("torch", "mlx"))
    assert abs(one.mean() - other.mean()) < 5 * one.std() / np.sqrt(len(one))
    assert one.std() > 1e-3
    assert 0.6 < one.std() / other.std() < 1.6  # with 0.8 for 0.2 it would be 4


@each
async def test_a_subset_of_the_modules_and_a_thread(tmp_path: Path, name: str) -> None:
    """Exactly the modules of the initial adapter are trained; and training may run beside an event loop."""
    base = tiny.llama(tmp_path / "base", tied=True)
    wanted = {m: s for m, s in tiny.modules_of(base).items() if m.endswith(("layers.1.self_attn.q_proj", "up_proj"))}
    plan = Batches(tiny.examples(16), batch_size=8, epochs=1, seed=0)
    initial = adapter.initial(wanted, rank=4, seed=0)
    _, result = await asyncio.to_thread(trained, name, base, initial, recipe_for(plan), plan)
    assert result.modules.keys() == wanted.keys()
    assert all(np.abs(factors.b).max() > 0 for factors in result.modules.values())


@each
def test_a_frozen_a_stays_to_the_bit_and_b_learns(tmp_path: Path, name: str) -> None:
    """Also from a snapshot on, and where dropout takes PEFT's own way."""
    base = tiny.llama(tmp_path / "base", tied=True)
    initial = adapter.initial(tiny.modules_of(base), rank=4, seed=0)
    plan = Batches(tiny.examples(16), batch_size=8, epochs=2, seed=0)
    for dropout in (0.0, 0.2):
        recipe = replace(recipe_for(plan, dropout), freeze_a=True)
        losses: list[float] = []
        kept: list[Snapshot] = []

        def keep(progress: Progress, losses: list[float] = losses, kept: list[Snapshot] = kept) -> None:
            losses.append(progress.loss)
            kept.append(Snapshot(tuple(losses), progress.arrays()))

        result = backends.load(name).train(base, initial, recipe, plan, keep)
        again = backends.load(name).train(base, initial, recipe, plan, lambda progress: None, kept[1])
        assert all(".a" not in array for array in kept[1].arrays), "what is not trained is not kept"
        for module, factors in result.modules.items():
            assert np.array_equal(factors.a, initial.modules[module].a)
            assert np.abs(factors.b).max() > 0 and np.array_equal(factors.b, again.modules[module].b)


@both
def test_parity_with_a_frozen(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", tied=True)
    plan = Batches(tiny.examples(), batch_size=8, epochs=2, seed=3)
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(4, 2, 3))
    assert_parity(base, initial, plan, freeze_a=True)


@each
def test_a_callback_can_interrupt(tmp_path: Path, name: str) -> None:
    base = tiny.llama(tmp_path / "base", tied=True)
    plan = Batches(tiny.examples(16), batch_size=8, epochs=1, seed=0)
    initial = adapter.initial(tiny.modules_of(base), rank=4, seed=0)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backends.load(name).train(base, initial, recipe_for(plan), plan, stop)


@each
def test_models_that_do_not_fit(tmp_path: Path, name: str) -> None:
    backend = backends.load(name)
    base = tiny.llama(tmp_path / "base", tied=True)
    plan = Batches(tiny.examples(8), batch_size=8, epochs=1, seed=0)

    def run(folder: Path, module: str, shape: Shape) -> None:
        backend.train(folder, adapter.initial({module: shape}, 2, 0), recipe_for(plan), plan, lambda progress: None)

    q = "model.layers.0.self_attn.q_proj"
    with pytest.raises(LayoutMismatch, match="no linear layer"):
        run(base, "model.layers.7.self_attn.q_proj", Shape(32, 24))
    with pytest.raises(LayoutMismatch, match="q_proj adapts"):
        run(base, q, Shape(24, 32))
    for broken in (tmp_path / "nothing", tmp_path):
        with pytest.raises(BadModel, match=r"holds no model that|config.json is not there"):
            run(broken, q, Shape(32, 24))
    (base / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(BadModel, match="holds no model that"):
        run(base, q, Shape(32, 24))
    tiny.llama(tmp_path / "damaged", tied=True)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(BadModel, match="holds no model that"):
        run(tmp_path / "damaged", q, Shape(32, 24))


def test_a_diverged_loss_is_an_error() -> None:
    with pytest.raises(BadData, match="training diverged: the loss of step 3 is nan"):
        Progress(3, 10, float("nan"), 5, 0.1, Setup(), dict)


@pytest.mark.parametrize("name", ["auto", *usable])
def test_choosing(name: str) -> None:
    backend: Backend = backends.choose(name)
    assert backend.name in usable and name in ("auto", backend.name)
    assert backend.device().split()[0] in ("cuda", "mps", "metal", "cpu")


def test_choosing_what_is_not_there() -> None:
    with pytest.raises(UsageError, match="no backend 'jax'"):
        backends.choose("jax")


def in_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_the_package_imports_no_framework() -> None:
    frameworks = "{'torch', 'mlx', 'mlx.core', 'mlx_lm', 'peft', 'transformers'}"
    modules = "edge_client.backends, edge_client.data.batches, edge_client.data.tokenize, edge_client.training.recipe"
    assert in_python(f"import sys, {modules}; print({frameworks} & set(sys.modules))") == "set()\n"


def without(framework: str) -> str:
    """Code after which a framework cannot be imported, as if it were not installed."""
    return f"import sys; sys.modules[{framework!r}] = None; from edge_client import backends\n"


@pytest.mark.parametrize(("name", "framework"), [("torch", "peft"), ("mlx", "mlx_lm.utils")])
def test_a_missing_framework_is_said_and_what_to_install(name: str, framework: str) -> None:
    ask = f"try: backends.choose({name!r})\nexcept backends.UsageError as e: print(e, '|', e.hint)"
    said = in_python(without(framework) + ask)
    assert said.startswith(f"no training backend: {name}: ")
    assert said.endswith(f"| pip install 'oneround[{name}]'\n")
