"""MLX computes what transformers computes, for every family, also where transformers 5 wrote the config."""

from pathlib import Path

import numpy as np
import pytest

from edge_client import backends
from tests.converters import tiny_families

pytestmark = pytest.mark.skipif(backends.load("mlx").available() is not None, reason="needs mlx")

# mlx-lm 0.32 has no sliding window for Gemma 2, and no final soft cap for Gemma 3.
SAME = [kind for kind in tiny_families.KINDS if kind not in ("gemma2", "gemma3-untied")]


@pytest.mark.parametrize("kind", SAME)
def test_logits(tmp_path: Path, kind: str) -> None:
    import mlx.core as mx

    from edge_client.backends import mlx as backend

    folder = tiny_families.save(tmp_path / kind, kind)
    found = np.array(backend._model(folder)(mx.array([tiny_families.PROMPT])))[0]
    expected = tiny_families.torch_logits(folder)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
