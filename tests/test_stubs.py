"""The checked-in stubs are what the proto gives, and every field of the contract says what it is."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

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


def test_no_runtime_is_asked_for_that_refuses_the_stubs() -> None:
    """Generated code takes no protobuf and no grpcio that is older than what made it."""
    v1 = SOURCE.parent
    protobuf = re.search(r"^# Protobuf Python Version: (.+)$", (v1 / "federation_pb2.py").read_text(), flags=re.M)
    grpcio = re.search(r"GRPC_GENERATED_VERSION = '(.+)'", (v1 / "federation_pb2_grpc.py").read_text())
    project = tomllib.loads((PROTO.parent / "pyproject.toml").read_text())["project"]
    asked = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    for name, made_by in (("protobuf", protobuf), ("grpcio", grpcio)):
        assert made_by
        assert str(asked[name]) == f">={made_by[1]}"


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
