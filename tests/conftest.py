"""Fixtures that tests of more than one package use, and how hypothesis draws.

Hypothesis draws the same examples in every `make test`, so that a failure is of the change and not of the day;
`make test-all` draws new ones.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import network
from tests.waiting import LONG, eventually

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


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own, of Debian's PostgreSQL, ended when the test is; its URL."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    bin_, folder = found[-1].parent, Path("/tmp") / tmp_path_factory.mktemp("pg").name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    as_user: list[str] = []
    if Path("/proc/self").owner() == "root":  # which PostgreSQL refuses to run as
        shutil.chown(folder, "postgres")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data = folder / "data"
    subprocess.run(
        [*as_user, bin_ / "initdb", "-D", data, "-U", "oneround", "-A", "trust"], check=True, capture_output=True
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*as_user, bin_ / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ready = [bin_ / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        assert eventually(lambda: subprocess.run(ready, capture_output=True).returncode == 0)
        yield f"postgresql+psycopg://oneround@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(LONG)
        shutil.rmtree(folder)
