"""The checked-in stubs are what the proto gives, and every field of the contract says what it is."""

import itertools
import re
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTO = Path(__file__).parent.parent / "proto"
SOURCE = PROTO / "oneround" / "v1" / "federation.proto"


def test_stubs_are_regenerated_equal(tmp_path: Path) -> None:
    includes = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [
        f"-I{PROTO}",
        f"-I{includes}",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        str(SOURCE),
    ]
    assert protoc.main(["protoc", *arguments]) == 0
    for made in tmp_path.rglob("*.py"):
        assert made.read_text() == (PROTO / made.relative_to(tmp_path)).read_text(), f"{made.name}: run `make proto`"


def test_every_field_and_call_is_commented() -> None:
    lines = SOURCE.read_text().splitlines()
    inside = ""
    missing = []
    for before, line in itertools.pairwise(lines):
        if opened := re.match(r"(message|service|enum) (\w+)", line):
            inside = opened[2]
            if not before.startswith("//") and not inside.endswith(("Request", "Reply")):
                missing.append(inside)
        declared = re.match(r"\s+(?:rpc|[\w.]+(?: [\w.]+)?) (\w+)(?: = \d+|\()", line)
        if declared and not before.strip().startswith("//"):
            missing.append(f"{inside}.{declared[1]}")
    assert not missing
