"""Conversions and inspections as people see them in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from converters.inspection import Inspection, Module

_MOST_TENSORS = 12


def converted(said: Mapping[str, Any]) -> Text:
    """What was written, and what to type next."""
    return Text(
        f"Wrote {said['path']}: {_count(said['modules'], 'module')} of rank {_spread(said['ranks'])},"
        f" {size(said['bytes'])}, from {said['from']} to {said['to']}.\nNext:  {said['next']}"
    )


def inspected(said: Inspection) -> RenderableType:
    """An adapter at a glance: what it is, norms by kind of module and by block, and what is wrong."""
    parts: list[RenderableType] = [Text(_headline(said), style="bold")]
    facts = {**{key: _value(value) for key, value in said.settings.items()}, **said.metadata}
    if said.modules:
        facts["scaling"] = ", ".join(f"{scaling:.4g}" for scaling in sorted({m.scaling for m in said.modules}))
        facts["factors"] = ", ".join(sorted({module.dtype for module in said.modules}))
    width = max((len(key) for key in facts), default=0)
    parts += [Text(f"  {key:<{width}}  {value}") for key, value in facts.items()]
    if said.modules:
        parts += [_kinds(said.modules), _blocks(said.modules)]
    if said.tensors:
        parts.append(Text(f"\n{_count(len(said.tensors), 'tensor')}:"))
        parts += [Text(f"  {line}") for line in said.tensors[:_MOST_TENSORS]]
        if more := len(said.tensors) - _MOST_TENSORS:
            parts += [Text(f"  and {more} more")] if more > 0 else []
    parts += [Text.assemble(("Wrong: ", "red"), problem) for problem in said.problems]
    parts += [Text.assemble(("Look at: ", "yellow"), remark) for remark in said.remarks]
    if not said.problems and not said.remarks:
        parts.append(Text("Nothing is wrong with it.", style="green"))
    return Group(*parts)


def size(count: float) -> str:
    """Bytes as people say them, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _headline(said: Inspection) -> str:
    names = {"canonical": "the common layout", "peft": "PEFT", "mlx": "mlx-lm", "gguf": "GGUF"}
    known = ""
    if said.modules:
        ranks = _spread({module.rank for module in said.modules})
        known = f"{_count(len(said.modules), 'module')} of rank {ranks}, "
    return f"{said.path}: an adapter in {names[said.format]}, {known}{size(said.size)}"


def _kinds(modules: Iterable[Module]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("module", "number", "rank", "‖ΔW‖ least", "median", "most"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    modules = list(modules)
    for kind in dict.fromkeys(module.kind for module in modules):
        of_kind = [module for module in modules if module.kind == kind]
        norms = [module.norm for module in of_kind]
        figures = [f"{value:.3g}" for value in (min(norms), float(np.median(norms)), max(norms))]
        table.add_row(escape(kind), str(len(of_kind)), _spread({module.rank for module in of_kind}), *figures)
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
        share = f"{escape(most.kind)}, {most.norm:.3g}" if whole > 0 else ""
        table.add_row("" if block is None else str(block), str(len(within)), f"{whole:.3g}", share)
    return table


def _spread(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        listed = Counter(str(item) for item in value)
        shown = ", ".join(list(listed)[:8])
        return shown + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
