from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.network import ip


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two machines on one cable: network namespaces with 10.77.0.1 and 10.77.0.2, and IPv6 beside."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("making network namespaces takes root, and ip")
    names = f"oneround-a{os.getpid()}", f"oneround-b{os.getpid()}"
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "lan0", "netns", names[0], "type", "veth", "peer", "name", "lan0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets nobody make network namespaces: {error.stderr}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "lan0")
            ip("-n", name, "addr", "add", f"fd77::{number}/64", "dev", "lan0", "nodad")
            for device in ("lo", "lan0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
