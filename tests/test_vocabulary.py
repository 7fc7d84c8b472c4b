"""One word for one thing: no two classes of the product share a name, and no module is named for nothing."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("proto/oneround", "converters", "coordinator", "edge_client")
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "manager", "managers", "handler", "handlers", "common", "misc"}


def modules() -> list[Path]:
    files = [file for house in PRODUCT for file in (ROOT / house).rglob("*.py") if "_pb2" not in file.name]
    assert len(files) > 100
    return files


def test_no_two_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(file.relative_to(ROOT)))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_no_module_is_named_for_nothing() -> None:
    names = {part for file in modules() for part in (*file.parent.relative_to(ROOT).parts, file.stem)}
    assert not names & EMPTY_WORDS
