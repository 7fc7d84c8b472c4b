"""One word for one thing: no two classes of the product share a name, no module is named for nothing, and a local has
the name of what it holds."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("proto/oneround", "converters", "coordinator", "edge_client")
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "manager", "managers", "handler", "handlers", "common", "misc"}
DEMONSTRATIVES = {
    *("found", "known", "given", "said", "made", "told", "asked"),
    *("there", "here", "what", "who", "whose", "this", "that", "these", "those"),
}


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


def test_no_local_is_named_by_a_demonstrative() -> None:
    """A local, a parameter or a comprehension's variable has the name of what it holds."""
    places = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {name}"
        for file in modules()
        for node, name in _locals(ast.parse(file.read_text("utf-8")))
        if name.strip("_").lower() in DEMONSTRATIVES
    ]
    assert not places, "\n".join(places)


def test_locals_are_told_from_fields() -> None:
    """The walk sees every kind of name that code binds, and passes over fields, whose names are JSON keys."""
    source = """
class Row:
    field: bool

    def method(self, parameter, *rest, key=0, **options):
        variable = [element for element in parameter]
        with open(parameter) as opened:
            for item in (walrus := rest):
                pass
        try:
            pass
        except ValueError as error:
            pass
        match parameter:
            case [first, *others] as whole:
                pass
            case {"a": value, **remaining}:
                pass
        return lambda argument: argument
"""
    assert {name for _, name in _locals(ast.parse(source))} == {
        *("self", "parameter", "rest", "key", "options", "variable", "element", "opened", "item", "walrus", "error"),
        *("first", "others", "whole", "value", "remaining", "argument"),
    }


def _locals(module: ast.Module) -> Iterator[tuple[ast.expr | ast.arg | ast.excepthandler | ast.pattern, str]]:
    fields = {
        statement.target
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(module):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) if node not in fields:
                yield node, name
            case ast.arg(arg=name):
                yield node, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node, name
            case ast.MatchMapping(rest=str(name)):
                yield node, name
