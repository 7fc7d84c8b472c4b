"""When is one round of averaging enough, when is it not, and what does it save?

    python benchmarks/one_shot_vs_multi_round.py                    # quick: at most ten minutes
    python benchmarks/one_shot_vs_multi_round.py --preset paper     # hours; goes on where it stopped
    python benchmarks/one_shot_vs_multi_round.py --preset paper --report-only

Cohorts train LoRA on tiny Llamas that were pretrained on Python's standard library, and on controls that were not
pretrained at all. Every arm begins from the same adapter, sees the same examples, and takes equally many local steps
(presets.tuned: the best of several settings for each arm, chosen on validation). Aggregation is the product's own;
local training is the product's recipe for a whole cohort at once (study/training.py), held to the backends by a test.

Each cell's figures are a line of cells.jsonl in --out, so an interrupted run loses one cell at most. In the end
report.md and its plots are written beside it, and one JSON document is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from study import cells, measure, presets, report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "one_shot_vs_multi_round"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets.PRESETS, default="quick")
    parser.add_argument("--out", type=Path, help="folder (default: build/study/PRESET, or results/ for paper)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--report-only", action="store_true", help="of what has been measured; measures nothing")
    options = parser.parse_args()
    out = options.out or (RESULTS if options.preset == "paper" else HERE.parent / "build" / "study" / options.preset)
    wanted = [cell for cell in presets.PRESETS[options.preset]() if measure.is_here(cell)]
    ledger = cells.Ledger(out / "cells.jsonl")
    began = time.monotonic()
    if not options.report_only:
        run(ledger, wanted, options.workers)
    document = report.write(out, ledger, wanted, options.preset, cells.machine())
    print(json.dumps(document | {"seconds": round(time.monotonic() - began)}, indent=2))


def run(ledger: cells.Ledger, wanted: list[cells.Cell], workers: int) -> None:
    """Measure what is missing."""
    missing = ledger.missing(wanted)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ProcessPoolExecutor(workers) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("cells", total=len(missing))
        queue, running = iter(missing), {}
        while True:
            for cell in queue:
                running[pool.submit(timed, cell)] = cell
                if len(running) >= workers + 1:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                result, seconds = future.result()
                ledger.add(cell, result, seconds)
                bar.advance(task)
                if not console.is_terminal:
                    print(f"{seconds:6.1f} s  {cell.name}", file=sys.stderr, flush=True)


def timed(cell: cells.Cell) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    return measure.measured(cell), time.perf_counter() - began


if __name__ == "__main__":
    main()
