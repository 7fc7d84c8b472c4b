"""Conversions and inspections as people see them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from converters.inspection import Inspection, Module
from oneround.text import human_size, printable

_MOST_LINES = 12
_MOST_ITEMS = 4


def converted(summary: Mapping[str, Any]) -> Text:
    """What was written, and what to type next."""
    padded_to = summary["padded_to"]
    padded = f"\nmlx-lm has one rank: lower ones were filled up with zeros to {padded_to}, which changes no ΔW."
    return _text(
        f"Wrote {summary['path']}: {_count(summary['modules'], 'module')} of rank {_spread(summary['ranks'])},"
        f" {human_size(summary['bytes'])}, from {summary['from']} to {summary['to']}."
        f"{padded if padded_to else ''}\nNext:  {summary['next']}"
    )


def inspected(inspection: Inspection) -> RenderableType:
    """An adapter at a glance: what it is, norms by kind of module and by block, and what is wrong."""
    parts: list[RenderableType] = [_text(_headline(inspection), "bold")]
    facts = {**{key: _value(value) for key, value in inspection.settings.items()}, **inspection.metadata}
    if inspection.modules:
        scalings = sorted({module.scaling for module in inspection.modules if module.scaling is not None})
        facts["scaling"] = _some([f"{scaling:.4g}" for scaling in scalings]) or "not known; norms are without it"
        facts["factors"] = ", ".join(sorted({module.dtype for module in inspection.modules}))
    width = max((len(key) for key in facts), default=0)
    parts += [_text(f"  {key:<{width}}  {value}") for key, value in facts.items()]
    if inspection.modules:
        parts += [_kinds(inspection.modules), _blocks(inspection.modules)]
    if inspection.tensors:
        parts.append(Text("Not part of a pair of LoRA factors:"))
        parts += [_text(f"  {line}") for line in _first(inspection.tensors)]
    parts += [Text.assemble(("Wrong: ", "red"), _text(problem)) for problem in _first(inspection.problems)]
    parts += [Text.assemble(("Look at: ", "yellow"), _text(remark)) for remark in _first(inspection.remarks)]
    if not inspection.problems and not inspection.remarks:
        parts.append(Text("Nothing is wrong with it.", style="green"))
    return Group(*parts)


def _headline(inspection: Inspection) -> str:
    names = {"canonical": "the common layout", "peft": "PEFT", "mlx": "mlx-lm", "gguf": "GGUF"}
    modules = ""
    if inspection.modules:
        ranks = _spread({module.rank for module in inspection.modules})
        modules = f"{_count(len(inspection.modules), 'module')} of rank {ranks}, "
    return f"{inspection.path}: an adapter in {names[inspection.format]}, {modules}{human_size(inspection.size)}"


def _kinds(modules: Iterable[Module]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("module", "number", "rank", "‖ΔW‖ least", "median", "most"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    modules = list(modules)
    for kind in dict.fromkeys(module.kind for module in modules):
        of_kind = [module for module in modules if module.kind == kind]
        norms = [module.norm for module in of_kind]
        figures = [f"{value:.3g}" for value in (min(norms), float(np.median(norms)), max(norms))]
        table.add_row(_text(kind), str(len(of_kind)), _spread({module.rank for module in of_kind}), *figures)
    return table


def _blocks(modules: Iterable[Module]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("block", justify="right")
    table.add_column("modules", justify="right")
    table.add_column("‖ΔW‖", justify="right")
    table.add_column("most of it in")
    by_block: dict[int | None, list[Module]] = {}
    for module in modules:
        by_block.setdefault(module.block, []).append(module)
    for block, within in sorted(by_block.items(), key=lambda item: -1 if item[0] is None else item[0]):
        norms = np.array([module.norm for module in within])
        most = within[int(np.argmax(norms))]
        whole = float(np.sqrt(np.square(norms).sum()))
        share = _text(f"{most.kind}, {most.norm:.3g}" if whole > 0 else "")
        table.add_row("" if block is None else str(block), str(len(within)), f"{whole:.3g}", share)
    return table


def _spread(ranks: Iterable[int]) -> str:
    distinct = sorted(set(ranks))
    return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return _some([f"{key} {_value(inner)}" for key, inner in value.items()])
    if isinstance(value, list):
        return _some([str(item) for item in value])
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MOST_ITEMS} more" if len(items) > _MOST_ITEMS else ""
    return ", ".join(items[:_MOST_ITEMS]) + more


def _first(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        yield f"and {len(lines) - _MOST_LINES} more; --json lists all"


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
