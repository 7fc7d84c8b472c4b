"""The one direction of imports, and what a coordinator may do without."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "proto/oneround": {"converters", "coordinator", "edge_client", "torch", "mlx", "transformers", "peft"},
    "converters": {"coordinator", "edge_client", "torch", "mlx", "mlx_lm", "transformers", "peft"},
    "coordinator": {"edge_client", "torch", "mlx", "mlx_lm", "transformers", "peft"},
    "edge_client": {"coordinator", "torch", "mlx", "mlx_lm", "peft"},
}


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = [file for file in (ROOT / package).rglob("*.py") if file.parent.name != "backends"]
    assert files
    for file in files:
        assert not imported(file) & FORBIDDEN[package], file


def test_what_tests_share_is_in_no_test() -> None:
    """Nobody imports from a test module or from a conftest."""
    files = sorted(file for file in (ROOT / "tests").rglob("*.py") if file.parent.name != "fixtures")  # history
    assert files
    for file in files:
        modules = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules += [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            top, *parts = module.split(".")
            tests = [part for part in parts if part.startswith("test_") or part == "conftest"]
            assert top != "tests" or not tests, f"{file} imports {module}"


def test_backends_import_nothing_of_the_coordinator() -> None:
    for file in (ROOT / "edge_client" / "backends").glob("*.py"):
        assert "coordinator" not in imported(file), file


def test_the_coordinator_starts_without_any_training_framework(tmp_path: Path) -> None:
    """In a process where importing one fails, as on a machine that has none: import, make a daemon, bind a server."""
    program = """
import asyncio, pathlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "mlx", "mlx_lm", "transformers", "peft", "tokenizers"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import coordinator.cli.app, coordinator.publication.build, coordinator.publication.verify
from coordinator.auth import identity
from coordinator.rpc import server
from coordinator.daemon import Daemon
state = pathlib.Path(sys.argv[1])
async def main():
    daemon = Daemon(state)
    grpc_server, address = server.create(daemon, identity.load_or_create(state), "127.0.0.1:0", insecure=False)
    await grpc_server.start()
    await grpc_server.stop(None)
    daemon.release()
    print("started", address)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "started 127.0.0.1:" in done.stdout


def test_every_package_is_installed() -> None:
    """A package that is not in the list would be missing where oneround is installed from a wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [init.parent for name in FORBIDDEN for init in (ROOT / name).rglob("__init__.py")]
    there = {str(folder.relative_to(ROOT)).removeprefix("proto/").replace("/", ".") for folder in folders}
    assert set(listed) == there and len(listed) == len(there)


def test_files_and_functions_are_read_in_a_sitting() -> None:
    """At most 400 lines a file, and 60 a function, but for generated stubs and tests."""
    files = [file for name in (*FORBIDDEN, "benchmarks", "docs") for file in (ROOT / name).rglob("*.py")]
    assert len(files) > 200
    for file in files:
        if "_pb2" not in file.name:
            text = file.read_text("utf-8")
            assert len(text.splitlines()) <= 400, file
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno and node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
