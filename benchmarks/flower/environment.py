"""An environment of its own for Flower, whose pins differ from ours; made once, and used again.

Flower needs protobuf before 7, and our stubs are made by 7: the environment has stubs of its own from the same .proto.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = Path(__file__).with_name("constraints.txt")
# Flower, what makes the stubs, and what `edge_client.backends.torch` imports.
PACKAGES = ["flwr", "grpcio-tools", "torch", "transformers", "peft", "safetensors", "numpy", "ml_dtypes", "gguf"]
PACKAGES += ["psutil", "threadpoolctl"]


def environment(folder: Path) -> dict[str, str]:
    """The variables for Flower's commands in `folder`, which is filled if it is not there or its pins have changed."""
    python, stubs = folder / "bin" / "python", folder / "stubs"
    pins = _pins()
    stamp = folder / f"ready-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    if not stamp.exists():
        print(f"setting up {folder}, once: some minutes", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _run(sys.executable, "-m", "venv", folder)
        constraints = folder / "constraints.txt"
        constraints.write_text(pins)
        _run(python, "-m", "pip", "install", "-q", "-c", constraints, *PACKAGES)
        stamp.touch()
    shutil.rmtree(stubs, ignore_errors=True)
    shutil.copytree(ROOT / "proto" / "oneround", stubs / "oneround", ignore=shutil.ignore_patterns("*_pb2*"))
    proto = ROOT / "proto" / "oneround" / "v1" / "federation.proto"
    _run(python, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--python_out={stubs}", proto)
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{stubs}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def versions(folder: Path, *names: str) -> dict[str, str]:
    said = _run(folder / "bin" / "python", "-m", "pip", "freeze")
    found = dict(line.split("==", 1) for line in said.splitlines() if "==" in line)
    return {name: found.get(name, "") for name in names}


def _pins() -> str:
    """Our pins, but for what Flower wants in another version."""
    theirs = PINS.read_text()
    names = {_name(line) for line in theirs.splitlines()}
    ours = (ROOT / "constraints.txt").read_text().splitlines()
    return "\n".join(line for line in ours if _name(line) not in names) + "\n" + theirs


def _name(line: str) -> str:
    return line.partition("==")[0].strip().lower().replace("_", "-")


def _run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout
