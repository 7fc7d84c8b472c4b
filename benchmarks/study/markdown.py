"""Figures and tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .results import Spread

Section = Iterator[str]  # lines
SEEDS = 3  # of which nothing has to be said


def said(value: Spread | None, digits: int = 3) -> str:
    return "" if value is None else _spread(value, f"{value.mean:.{digits}f}", f"{value.sd:.{digits}f}")


def percent(value: Spread | None) -> str:
    return "" if value is None else _spread(value, f"{100 * value.mean:.0f}", f"{100 * value.sd:.0f}", " %")


def _spread(value: Spread, mean: str, sd: str, unit: str = "") -> str:
    count = "" if value.seeds == SEEDS else f" ({value.seeds})"
    return mean + (f" ± {sd}" if value.seeds > 1 else "") + unit + count


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Without columns and rows that have nothing but their names. `numbers`: all but the first column is."""
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return []
    kept = [at for at in range(len(heading)) if not at or any(row[at] for row in rows)]
    align = ["---", *["---:" if numbers else "---"] * (len(kept) - 1)]
    picked = [[heading[at] for at in kept], align, *[[row[at] for at in kept] for row in rows]]
    return ["| " + " | ".join(row) + " |" for row in picked] + [""]


def titled(title: str, prose: str, rows: list[str], picture: str = "") -> Section:
    """A section, if it has anything."""
    if rows or picture:
        yield from (f"## {title}", "", prose, "", *rows)
        if picture:
            yield from (f"![{title}]({picture})", "")
