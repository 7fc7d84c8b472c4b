"""An adapter through any chain of formats is the adapter that it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters import adapter, architectures, mlx, peft
from converters.adapter import Adapter, LowRank
from converters.architectures import Base
from converters.gguf import adapter as gguf_adapter
from tests.converters import tiny

Step = Callable[[Adapter, Path, Base], Adapter]


def through_canonical(given: Adapter, path: Path, base: Base) -> Adapter:
    adapter.write(given, path)
    return adapter.read(path)


def through_peft(given: Adapter, path: Path, base: Base) -> Adapter:
    peft.write(given, path, base_model="x")
    return peft.read(path)


def through_mlx(given: Adapter, path: Path, base: Base) -> Adapter:
    mlx.write(given, path, base)
    return mlx.read(path)


def through_gguf(given: Adapter, path: Path, base: Base) -> Adapter:
    gguf_adapter.write(given, path, base)
    return gguf_adapter.read(path, base)


STEPS: dict[str, Step] = {
    "canonical": through_canonical,
    "peft": through_peft,
    "mlx": through_mlx,
    "gguf": through_gguf,
}
CHAINS = [chain for length in (2, 3, 4) for chain in itertools.permutations(STEPS, length)]


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Base:
    return architectures.describe(bases["untied"])


def follow(chain: tuple[str, ...], given: Adapter, folder: Path, base: Base) -> Adapter:
    for n, step in enumerate(chain):
        given = STEPS[step](given, folder / f"{n}-{step}", base)
    return given


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_factors_come_back_bit_for_bit(base: Base, tmp_path: Path, chain: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    first = Adapter(
        {
            name: LowRank(
                rng.normal(size=(3, shape.into)).astype(np.float32), rng.normal(size=(shape.out, 3)).astype(np.float32)
            )
            for name, shape in base.linears.items()
        }
    )
    again = follow(chain, first, tmp_path, base)
    assert again.modules.keys() == first.modules.keys()
    for name, update in first.modules.items():
        assert np.array_equal(again.modules[name].a, update.a)
        assert np.array_equal(again.modules[name].b, update.b)


@pytest.mark.parametrize("chain", [("mlx", "gguf", "peft"), ("gguf", "canonical", "mlx"), ("peft", "mlx", "gguf")])
def test_mixed_ranks_and_left_out_layers_keep_their_delta(base: Base, tmp_path: Path, chain: tuple[str, ...]) -> None:
    """mlx-lm has one rank and the same modules in all blocks: it is given zeros, which change no ΔW."""
    rng = np.random.default_rng(1)
    first = {}
    for n, (name, shape) in enumerate(base.linears.items()):
        if n % 3:
            a, b = rng.normal(size=(n % 5 + 1, shape.into)), rng.normal(size=(shape.out, n % 5 + 1))
            first[name] = LowRank(a.astype(np.float32), b.astype(np.float32))
    again = follow(chain, Adapter(first), tmp_path, base)
    assert again.modules.keys() >= first.keys()
    for name, update in again.modules.items():
        expected = first[name].delta() if name in first else np.zeros(update.shape, np.float32)
        np.testing.assert_allclose(update.delta(), expected, rtol=0, atol=1e-6 * max(np.abs(expected).max(), 1e-9))


@pytest.mark.parametrize("alpha", [8, 10, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_folded_once(bases: dict[str, Path], base: Base, tmp_path: Path, alpha: float, rslora: bool) -> None:
    """Exactly with a power of two, as alpha 8 with rank 4; else within a rounding of float32."""
    original = tiny.save_adapter(tmp_path / "original", bases["untied"], lora_alpha=alpha, use_rslora=rslora)
    folded = peft.read(original)
    again = follow(("mlx", "gguf", "canonical", "peft"), folded, tmp_path, base)
    scaling = alpha / (2 if rslora else 4)
    for name, update in folded.modules.items():
        (term,) = update.terms
        assert np.array_equal(again.modules[name].b, update.b)
        exact = scaling * term.b.astype(np.float64) @ term.a.astype(np.float64)
        found = again.modules[name].b.astype(np.float64) @ again.modules[name].a.astype(np.float64)
        assert np.linalg.norm(found - exact) <= 1e-6 * np.linalg.norm(exact)
        if alpha == 8:
            assert np.array_equal(update.b, np.float32(scaling) * term.b)


@pytest.mark.parametrize("alpha", [None, 0.0, 6.0])
def test_a_gguf_adapter_with_and_without_alpha(base: Base, tmp_path: Path, alpha: float | None) -> None:
    """With an alpha every tensor is scaled by its own rank."""
    import gguf

    first = Adapter(
        {name: LowRank(np.ones((n % 3 + 1, shape.into), np.float32), np.ones((shape.out, n % 3 + 1), np.float32))
         for n, (name, shape) in enumerate(base.linears.items())}
    )  # fmt: skip
    gguf_adapter.write(first, tmp_path / "plain.gguf", base)
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", base.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.astype(np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = gguf_adapter.read(tmp_path / "adapter.gguf", base)
    for name, update in first.modules.items():
        scale = alpha / update.rank if alpha else 1.0
        np.testing.assert_allclose(found.modules[name].delta(), scale * update.delta(), rtol=1e-6)
