"""Cells → a report in Markdown with plots, and the figures that it is made of.

Every section says what it shows and takes whatever there is; what has not been measured is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import ONE_SHOT, Cell, Ledger
from .comparisons import algorithms, gaps, methods, overview, pairs, setting, tuned
from .influences import arrivals, asked, bound, cost, limits, local, sweeps
from .results import Results

SECTIONS = (
    setting,
    overview,
    gaps,
    methods,
    algorithms,
    tuned,
    sweeps,
    local,
    bound,
    arrivals,
    cost,
    asked,
    limits,
)


def write(out: Path, ledger: Ledger, wanted: Sequence[Cell], preset: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """report.md and its plots in `out`; returns the main figures."""
    results = Results(ledger.found)
    names = {cell.name for cell in wanted}
    done = [one for one in ledger if one["cell"] in names]
    seconds = sum(one["seconds"] for one in done)
    lines = [
        "# One round against many: the report",
        "",
        f"Preset `{preset}`: {len(done)} of {len(names)} cells, {seconds / 3600:.1f} hours of one core in all. "
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f"; {machine['when']}. Each cell's figures are a line of [cells.jsonl](cells.jsonl).",
        "",
    ]
    for section in SECTIONS:
        lines += section(results, out)
    text = "\n".join(lines).rstrip() + "\n"
    part = out / "report.md.part"
    part.write_text(text, encoding="utf-8")
    part.replace(out / "report.md")
    document = {"preset": preset, "machine": dict(machine), "cells": len(done), "of": len(names)} | figures(results)
    (out / "report.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


# How figures are said


def figures(results: Results) -> dict[str, Any]:
    """The main ones, for machines: shares by base, task and arm."""
    found: dict[str, Any] = {}
    for base, task in pairs(results):
        one = Cell(base, task, ONE_SHOT)
        arms = {"mean local": (one, "local"), "best local": (one, "best local"), "one-shot exact": (one, "exact")}
        for rounds in (3, 10):
            arms[f"fedavg T={rounds}"] = (Cell(base, task, "fedavg", rounds=rounds), "")
        found[f"{base}: {task}"] = {
            name: {"share": round(share.mean, 4), "sd": round(share.sd, 4), "seeds": share.seeds}
            for name, (cell, arm) in arms.items()
            if (share := results.share(cell, arm))
        }
    return {"shares": found}
