"""Fixtures that tests of more than one package use, and how hypothesis draws.

Hypothesis draws the same examples in every `make test`, so that a failure is of the change and not of the day;
`make test-all` draws new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import network

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None)
settings.load_profile("same")

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: `tied`, without biases, and `untied`, with biases on q, k and v and in several files."""
    from tests.converters import tiny  # imports transformers, which most tests do without

    root = tmp_path_factory.mktemp("bases")
    tiny.save_model(root / "tied", tiny.config(tied=True))
    tiny.save_model(root / "untied", tiny.config(tied=False), max_shard_size="200KB")
    for folder in root.iterdir():
        tiny.save_tokenizer(folder)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(params=["tied", "untied"])
def base(bases: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """Each of `bases`."""
    return bases[request.param]


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of a small trained model."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K model is not beside this repository")
    return STORIES


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two machines on one cable: network namespaces with 10.77.0.1 and 10.77.0.2, and IPv6 beside."""
    with network.two_machines() as names:
        yield names
