from __future__ import annotations

from pathlib import Path

import pytest

from tests.converters import tiny

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: `tied`, without biases, and `untied`, with biases on q, k and v and in several files."""
    root = tmp_path_factory.mktemp("bases")
    tiny.save_model(root / "tied", tiny.config(tied=True))
    tiny.save_model(root / "untied", tiny.config(tied=False), max_shard_size="200KB")
    for folder in root.iterdir():
        tiny.save_tokenizer(folder)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(params=["tied", "untied"])
def base(bases: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return bases[request.param]


@pytest.fixture(scope="session")
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip("the stories260K model is not beside this repository")
    return STORIES
