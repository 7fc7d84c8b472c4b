"""The checked-in stubs are what the proto gives, and every field of the contract says what it is."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).parent.parent / "proto"
SOURCE = PROTO / "oneround" / "v1" / "federation.proto"


def test_stubs_are_regenerated_equal(tmp_path: Path) -> None:
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    out = [f"--{kind}_out={tmp_path}" for kind in kinds]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *out, str(SOURCE)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where mypy-protobuf's plug-ins are
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    made = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert len(made) == len(kinds)
    for file in made:
        assert file.read_text() == (PROTO / file.relative_to(tmp_path)).read_text(), f"{file.name}: run `make proto`"


def test_every_field_and_call_is_commented() -> None:
    lines = SOURCE.read_text().splitlines()
    inside = ""
    missing = []
    for before, line in itertools.pairwise(lines):
        if opened := re.match(r"(message|service|enum) (\w+)", line):
            inside = opened[2]
            if not before.startswith("//") and not inside.endswith(("Request", "Reply")):
                missing.append(inside)
        declared = re.match(r"\s+(?:rpc )?(?:repeated )?(?:[\w.]+ )?(\w+)(?: = \d+|\()", line)
        if declared and not before.strip().startswith("//"):
            missing.append(f"{inside}.{declared[1]}")
    assert not missing
