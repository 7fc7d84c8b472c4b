"""Cells → a report in Markdown with plots, and the figures that it is made of.

Every section says what it shows and takes whatever there is; what has not been measured is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import time_to_model

from . import plots, presets
from .cells import CENTRALISED, FROZEN, ONE_SHOT, Cell, Ledger
from .measure import BASES, BATCH_SIZE, UNPRETRAINED, Llama
from .plots import Panel
from .presets import MAIN, PACKAGES, SPEAKERS
from .results import Results, Spread
from .rounds import ALGORITHMS
from .tasks import TASKS

Section = Iterator[str]
MEASURED = Path(__file__).resolve().parents[1] / "results"  # by the other benchmarks


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


# Sections


def pairs(results: Results) -> list[tuple[str, str]]:
    """Bases and tasks that there are one-shot cells for."""
    names = [name + control for name in BASES for control in ("", UNPRETRAINED)]
    return [(base, task) for base in names for task in TASKS if results.of(Cell(base, task, ONE_SHOT))]


def setting(results: Results, out: Path) -> Section:
    rows = [
        [
            task,
            f"{one.examples:,}",
            f"{one.max_seq_len}",
            f"{one.epochs:g}",
            f"{one.learning_rate:g}",
            {"groups": "one label each", "random": "at random"}[one.dealt],
        ]
        for task, one in TASKS.items()
        if any(task == other for _, other in pairs(results))
    ]
    sizes = [
        [name, f"{Llama.load(folder).num_parameters:,}"]
        for name, folder in BASES.items()
        if folder.exists() and any(base.startswith(name) for base, _ in pairs(results))
    ]
    yield from titled(
        "What was done",
        "Ten clients train LoRA (rank 16, alpha 32, all linear layers) from one initial adapter, with AdamW, a linear "
        f"schedule to zero in each job, clipping at 1, batches of {BATCH_SIZE} examples, in float32: 60 steps each, in "
        "one round or spread over several. A further round is a further one-round job that starts from the adapter "
        "before it; optimizers begin anew. Centralised: the same recipe and passes on everybody's examples in one "
        "place, which is ten times as many steps in a row. Losses are nats per target token on a test set that has the "
        "same number of examples of every label, the same for all arms and seeds; a seed draws the training examples, "
        "who has them, the initial adapter and the order. Figures are means ± standard deviations over three seeds; "
        "another number of them stands in parentheses. A *share* is (base − arm) / (base − centralised), seed by seed.",
        [
            *table(("task", "examples", "longest", "epochs", "learning rate", "who has what"), rows),
            *table(("base", "parameters"), sizes),
        ],
    )


def overview(results: Results, out: Path) -> Section:
    rows = []
    for base, task in pairs(results):
        one, pooled = Cell(base, task, ONE_SHOT), Cell(base, task, CENTRALISED)
        several = [Cell(base, task, "fedavg", rounds=rounds) for rounds in (3, 10)]
        rows.append(
            [
                f"{base}: {task}",
                said(results.loss(pooled, "base")),
                said(results.loss(one, "local")),
                said(results.loss(one, "best local")),
                said(results.loss(one, "exact")),
                *(said(results.loss(cell)) for cell in several),
                said(results.loss(pooled)),
            ]
        )
    heading = ("base: task", "base", "mean local", "best local", "one round, `exact`", "T = 3", "T = 10", "centralised")
    yield from titled(
        "Losses",
        "One round by the product's default, `exact`, against FedAvg in T rounds of as many steps in all. Best local: "
        "the client's own model that does best on validation. A base that was not pretrained is the control: it has "
        "its architecture's random weights.",
        table(heading, rows),
    )


def gaps(results: Results, out: Path) -> Section:
    rows = []
    for base, task in pairs(results):
        one = Cell(base, task, ONE_SHOT)
        several = [Cell(base, task, "fedavg", rounds=rounds) for rounds in (3, 10)]
        rows.append(
            [
                f"{base}: {task}",
                percent(results.share(one, "local")),
                percent(results.share(one, "best local")),
                percent(results.share(one, "exact")),
                *(percent(results.share(cell)) for cell in several),
                difference(results, one, several[1]),
            ]
        )
    heading = ("base: task", "mean local", "best local", "one round", "T = 3", "T = 10", "T = 10 − one round, nats")
    yield from titled(
        "Shares of the gap from the base to centralised",
        "The last column is the loss that ten rounds save over one, seed by seed; negative where one round is better.",
        table(heading, rows),
    )


def difference(results: Results, one: Cell, several: Cell) -> str:
    first, second = results.losses(one), results.losses(several)
    return said(Spread.of([first[seed] - second[seed] for seed in first if seed in second]))


def methods(results: Results, out: Path) -> Section:
    tasks = [task for task in (SPEAKERS, PACKAGES) if results.of(Cell(MAIN, task, ONE_SHOT))]
    arms = [
        (kind, arm) for kind in (ONE_SHOT, FROZEN) for arm in results.arms(Cell(MAIN, SPEAKERS, kind)) if arm != "base"
    ] or [
        (kind, arm) for kind in (ONE_SHOT, FROZEN) for arm in results.arms(Cell(MAIN, PACKAGES, kind)) if arm != "base"
    ]
    rows = []
    for kind, arm in sorted(arms, key=lambda pair: _mean(results.loss(Cell(MAIN, tasks[0], pair[0]), pair[1]))):
        row = [f"`{arm}`" + (" (A frozen)" if kind == FROZEN else "")]
        for task in tasks:
            cell = Cell(MAIN, task, kind)
            row += [said(results.loss(cell, arm)), percent(results.share(cell, arm))]
        rows.append(row)
    heading = ["method", *(text for task in tasks for text in (task, "share"))]
    yield from titled(
        "One round, every method",
        f"Base {MAIN}. The same ten contributions, aggregated by each method of the product with its defaults "
        "(`krum` and `trimmed-mean` told to bear two bad clients; `svd` to rank 16; `task-arithmetic × λ` is `exact` "
        "with that server learning rate). Methods that need a frozen A have contributions of their own.",
        table(heading, rows),
    )


def _mean(value: Spread | None) -> float:
    return value.mean if value else float("inf")


def algorithms(results: Results, out: Path) -> Section:
    rows = []
    for task in (SPEAKERS, PACKAGES):
        one = Cell(MAIN, task, ONE_SHOT)
        for name in ALGORITHMS:
            cells = [Cell(MAIN, task, name, rounds=rounds) for rounds in presets.ROUNDS]
            rows.append([f"{task}: {name}", *(percent(results.share(cell)) for cell in cells)])
        best = percent(results.share(one, "exact"))
        rows.append([f"{task}: **one round, `exact`**", *([best] * len(presets.ROUNDS))])
    heading = ("task: algorithm", *(f"T = {rounds}" for rounds in presets.ROUNDS))
    panels = []
    for task in (SPEAKERS, PACKAGES):
        lines = {
            "FedAvg": [
                (float(rounds), results.share(Cell(MAIN, task, "fedavg", rounds=rounds)))
                for rounds in presets.MORE_ROUNDS
            ]
        }
        lines["FedAvg"].insert(0, (1.0, results.share(Cell(MAIN, task, ONE_SHOT), "fedavg")))
        lines["one round, exact"] = [
            (float(rounds), results.share(Cell(MAIN, task, ONE_SHOT), "exact")) for rounds in (1, 60)
        ]
        ticks = [(float(rounds), str(rounds)) for rounds in (1, 2, 3, 5, 10, 20, 60)]
        panels.append(Panel(shares(lines), task, "rounds T", "share of the gap, %", log=True, ticks=ticks))
    picture = "rounds.png" if plots.write(out / "rounds.png", panels) else ""
    yield from titled(
        "Several rounds, every algorithm, as many steps in all",
        f"Base {MAIN}, shares of the gap. Server learning rates are the algorithms' usual ones (FedAdam and FedYogi "
        "3e-3, DiLoCo 0.7, else 1), FedProx's μ is 0.1. At T = 20 and T = 60 clients meet three times an epoch, and "
        "after every single step.",
        table(heading, rows),
        picture,
    )


def shares(lines: Mapping[str, Sequence[tuple[float, Spread | None]]]) -> dict[str, list[tuple[float, Spread]]]:
    """In percent, without what is missing."""
    return {
        name: [(x, Spread(100 * y.mean, 100 * y.sd, y.seeds)) for x, y in line if y] for name, line in lines.items()
    }


def tuned(results: Results, out: Path) -> Section:
    tasks = [task for task in TASKS if results.of(presets.times(Cell(MAIN, task, ONE_SHOT), *presets.TUNED[0]))]
    rows = []
    for task in tasks:
        candidates: dict[str, list[tuple[Cell, str]]] = {}
        for cell in presets.tuned(MAIN, task, 0, settings=(*presets.TUNED, presets.LONGER)):
            if cell.algorithm == ONE_SHOT:
                if results.of(cell):
                    candidates.setdefault("one round, `exact`", []).append((cell, "exact"))
                    candidates.setdefault("one round, any method", []).extend(
                        (cell, arm) for arm in results.arms(cell) if arm != "base"
                    )
                    candidates.setdefault("best local", []).append((cell, "best local"))
            elif cell.algorithm == CENTRALISED and results.of(cell):
                candidates.setdefault("centralised", []).append((cell, "centralised"))
            elif results.of(cell):
                candidates.setdefault(f"{cell.algorithm}, T = {cell.rounds}", []).append((cell, ""))
        pooled = results.best(candidates["centralised"])
        for arm, of in candidates.items():
            best = results.best(of)
            if best is None or pooled is None or len(of) < len(presets.TUNED):
                continue
            cell, which = best
            recipe = TASKS[task]
            how = f"lr {cell.learning_rate or recipe.learning_rate:g}, {cell.epochs or recipe.epochs:g} epochs"
            how += f", `{which}`" if arm.endswith("any method") else ""
            how += f", server lr {cell.server_learning_rate:g}" if cell.server_learning_rate else ""
            how += ", one schedule over all rounds" if cell.continued else ""
            share = results.share(cell, which, pooled[0])
            rows.append([f"{task}: {arm}", said(results.loss(cell, which)), percent(share), how, f"{len(of)}"])
    yield from titled(
        "Each arm at its best",
        f"Base {MAIN}. Not tied to equal steps: every arm takes the setting that does best on "
        "validation, of the learning rates and epochs (and server learning rates, and schedules) that were tried; "
        "losses are on the test set, shares of the gap to the best centralised run.",
        table(("task: arm", "test loss", "share", "chosen", "of settings"), rows),
    )


def sweeps(results: Results, out: Path) -> Section:
    task = SPEAKERS
    one, three, ten = (
        Cell(MAIN, task, ONE_SHOT),
        Cell(MAIN, task, "fedavg", rounds=3),
        Cell(MAIN, task, "fedavg", rounds=10),
    )
    pooled = Cell(MAIN, task, CENTRALISED)
    recipe = TASKS[task]

    def lines(
        change: Callable[[Cell, Any], Cell], values: Sequence[Any], arms: Mapping[str, Cell], at: Callable[[Any], float]
    ) -> dict[str, list[tuple[float, Spread]]]:
        return {
            name: [(at(value), found) for value in values if (found := results.loss(change(cell, value)))]
            for name, cell in arms.items()
        }

    arms = {"one round": one, "T = 3": three, "T = 10": ten}
    alphas = ("0.1", "0.5", "1", "inf")
    many = {"examples": presets.MANY, "epochs": presets.MANY_EPOCHS}
    panels = [
        Panel(
            lines(
                lambda cell, count: replace(cell, clients=count, **many),
                presets.CLIENTS,
                {"one round": one, "T = 5": replace(three, rounds=5)},
                float,
            ),
            f"clients, of {presets.MANY:,} examples in all",
            "clients",
            "test loss",
            log=True,
            ticks=[(float(n), str(n)) for n in presets.CLIENTS],
        ),
        Panel(
            lines(lambda cell, alpha: replace(cell, dealt=alpha), alphas, arms, lambda a: alphas.index(a)),
            "Dirichlet's α (speakers)",
            "α",
            "test loss",
            ticks=[(float(at), {"inf": "∞"}.get(alpha, alpha)) for at, alpha in enumerate(alphas)],
        ),
        Panel(
            lines(
                lambda cell, epochs: presets.times(cell, 1.0, epochs),
                presets.LOCAL_EPOCHS,
                {**arms, "centralised": pooled},
                lambda epochs: epochs * recipe.epochs,
            ),
            "local epochs in all",
            "epochs",
            "test loss",
            log=True,
            ticks=[(epochs * recipe.epochs, f"{epochs * recipe.epochs:g}") for epochs in presets.LOCAL_EPOCHS],
        ),
        Panel(
            lines(
                lambda cell, rank: replace(cell, rank=rank),
                presets.RANKS,
                {"one round": one, "T = 3": three, "centralised": pooled},
                float,
            ),
            "rank",
            "rank",
            "test loss",
            log=True,
            ticks=[(float(rank), str(rank)) for rank in presets.RANKS],
        ),
    ]
    rows: list[str] = []
    for panel in panels:
        xs = [said_x for _, said_x in panel.ticks]
        body = [[name, *(said(dict(line).get(at)) for at, _ in panel.ticks)] for name, line in panel.lines.items()]
        rows += table([panel.title, *xs], body)
    picture = "sweeps.png" if plots.write(out / "sweeps.png", panels) else ""
    yield from titled(
        "Sweeps",
        f"Base {MAIN}, {task}, test losses. Clients: the same examples cut finer, laid by speaker. Dirichlet: who has "
        "how much of each speaker; ∞ is at random. Epochs: at the same learning rate.",
        rows,
        picture,
    )


def local(results: Results, out: Path) -> Section:
    rows = []
    for base, task in pairs(results):
        cell = Cell(base, task, ONE_SHOT)
        better = results.mean(
            cell, lambda result: sum(one["test"] < result["losses"]["exact"]["test"] for one in result["local"])
        )
        spread = results.mean(cell, lambda result: float(np.std([one["test"] for one in result["local"]])))
        rows.append(
            [
                f"{base}: {task}",
                said(results.loss(cell, "local")),
                said(spread),
                said(results.loss(cell, "exact")),
                "" if better is None else f"{better.mean:.1f}",
            ]
        )
    heading = (
        "base: task",
        "mean local",
        "spread among clients",
        "one round, `exact`",
        "locals better than that, of 10",
    )
    yield from titled("Local against global", "The paper's Table 6, on everybody's test set.", table(heading, rows))


def bound(results: Results, out: Path) -> Section:
    keys = ("smoothness", "update_size", "epsilon", "observed", "observed_over_norm")
    rows: list[list[str]] = []
    by_size: dict[str, dict[str, list[tuple[float, Spread]]]] = {}
    ticks: dict[float, str] = {}
    for base, task in pairs(results):
        cell = Cell(base, task, "fedavg", rounds=3)
        found = {key: results.mean(cell, lambda result, key=key: result.get("bound", {}).get(key)) for key in keys}
        rows.append([f"{base}: {task}", *(said(found[key]) for key in keys)])
        if task == SPEAKERS and found["smoothness"] and not base.startswith("stories"):
            size = float(Llama.load(BASES[base.removesuffix(UNPRETRAINED)]).num_parameters)
            kind = "not pretrained" if base.endswith(UNPRETRAINED) else "pretrained"
            ticks[size] = base.removesuffix(UNPRETRAINED)
            for key in keys:
                by_size.setdefault(key, {}).setdefault(kind, []).append((size, found[key]))
    words = {
        "smoothness": "smoothness L",
        "update_size": "update size τ",
        "epsilon": "bound ε",
        "observed_over_norm": "observed ‖w₁ − w_T‖ / ‖w₀‖",
    }
    panels = [
        Panel(by_size.get(key, {}), name, "base", name, log=True, ticks=list(ticks.items()))
        for key, name in words.items()
    ]
    picture = "bound.png" if plots.write(out / "bound.png", panels) else ""
    yield from titled(
        "The paper's bound",
        "L = ‖∇F(w₀) − ∇F(w_T)‖ / ‖w₀ − w_T‖ and τ = ‖w_T − w₀‖ / ‖w₀‖ over the dense weights of the adapted modules, "
        "w_T after three rounds, F on 128 pooled training examples; ε = L·τ·Tk·‖w₀‖; observed: how far apart the "
        "weights after one round and after three are (the paper's Figures 2 and 3).",
        table(("base: task", "L", "τ", "ε", "observed ‖w₁ − w_T‖", "observed / ‖w₀‖"), rows),
        picture,
    )


def arrivals(results: Results, out: Path) -> Section:
    panels = []
    for task in (SPEAKERS, PACKAGES):
        lines = {}
        for base in (MAIN, "1.3M", "5M"):
            curves = [
                curve for result in results.of(Cell(base, task, ONE_SHOT)).values() for curve in result["arrivals"]
            ]
            if curves:
                whole = np.array(curves)
                lines[base] = [(float(at + 1), Spread.of(list(whole[:, at]))) for at in range(whole.shape[1])]
        panels.append(Panel(lines, task, "clients that are in", "validation loss"))
    picture = "arrivals.png" if plots.write(out / "arrivals.png", panels) else ""
    yield from titled(
        "As clients arrive",
        "The loss of the `exact` mean of those that are in, over five random orders of each seed (the paper's "
        "Figure 5); shaded: one standard deviation over orders and seeds.",
        [],
        picture,
    )


def cost(results: Results, out: Path) -> Section:
    """What wire_cost.py counted on the wire, beside what it bought."""
    file = MEASURED / "wire_cost.json"
    wire = json.loads(file.read_text("utf-8"))["bases"].get(MAIN) if file.exists() else None
    if not wire:
        return
    first, further = wire["chain"]["rounds"][0], wire["chain"]
    ways = ("up_per_client", "down_per_client")
    arms: list[tuple[str, Cell, str, tuple[int, ...]]] = [
        ("one round, `ffa`", Cell(MAIN, "", FROZEN), "ffa", tuple(wire["ffa"][way] for way in ways)),
        ("one round, `exact`", Cell(MAIN, "", ONE_SHOT), "exact", tuple(wire["exact"][way] for way in ways)),
    ]
    for rounds in presets.MORE_ROUNDS:
        passed = tuple(first[way] + (rounds - 1) * further[way] for way in ways)
        arms.append((f"FedAvg, T = {rounds}", Cell(MAIN, "", "fedavg", rounds=rounds), "", passed))
    tasks = (SPEAKERS, PACKAGES)
    rows = []
    for name, cell, arm, passed in arms:
        closed = (percent(results.share(replace(cell, task=task), arm)) for task in tasks)
        rows.append([name, *(f"{count / 1e3:,.0f} kB" for count in passed), *closed])
    panels = []
    for task in tasks:
        points = [
            (name, sum(passed) / 1e3, results.share(replace(cell, task=task), arm)) for name, cell, arm, passed in arms
        ]
        lines = {"several rounds": [(x, y) for name, x, y in points if name.startswith("FedAvg")]}
        lines |= {name.replace("`", ""): [(x, y)] for name, x, y in points if not name.startswith("FedAvg")}
        panels.append(Panel(shares(lines), task, "kB of each client, up and down", "share of the gap, %", log=True))
    picture = "bytes.png" if plots.write(out / "bytes.png", panels) else ""
    yield from titled(
        "What it costs",
        f"Base {MAIN}. Bytes of one client on the wire, TLS and gRPC and signing in included, counted between real "
        "clients and the real coordinator (wire_cost.py): the first round and each further one were counted, T rounds "
        "are their sum. The base is on the client's disk; heartbeats, which hang on time, are not in it.",
        table(("arm", "up", "down", *tasks), rows),
        picture,
    )
    simulated = MEASURED / "time_to_model.json"
    if simulated.exists():
        prose = (
            "Hours from submitting a job to the model, simulated with measured bytes, steps and publishing, and with "
            "stated devices and links (time_to_model.py): the median over seeds, and the 10th and 90th percentile."
        )
        yield from titled(
            "Time to the model", prose, time_to_model.table(json.loads(simulated.read_text())).split("\n")
        )


def asked(results: Results, out: Path) -> Section:
    answers = {
        "other multi-round algorithms than FedAvg": "*Several rounds, every algorithm*; *Each arm at its best*",
        "a comparison not tied to equal steps": "*Each arm at its best*",
        "more than 100 clients": "*Sweeps*, up to 300",
        "several degrees of heterogeneity": "*Sweeps*, Dirichlet's α; and tasks by label beside tasks at random",
        "other one-shot methods": "*One round, every method*",
        "orders of arrival": "*As clients arrive*",
        "variance": "three seeds throughout",
        "quality against communication": "*What it costs*",
        "meeting more often than once an epoch": "T = 10, 20 and 60 of five epochs (two for the standard library)",
    }
    rows = [list(one) for one in answers.items()]
    prose = "Of the paper that this repeats, arXiv 2412.04650, where each of it is answered here."
    yield from titled("What reviewers asked for", prose, table(("asked for", "answered in"), rows, numbers=False))


def limits(results: Results, out: Path) -> Section:
    yield from titled(
        "What this does not show",
        "Bases have at most five million parameters, and were pretrained once each, on 16 million tokens: what the "
        "paper says of 1 to 13 billion is not tested here, only its trend over sizes that two cores can train. Quality "
        "is loss, not a score on a benchmark of questions, which models of this size cannot answer. Examples are short "
        "and few. LoRA only: no full fine-tuning. Clients are honest and all of them "
        "come through; robustness.py and the tests of rounds have the rest. Optimizers' states do not outlive a round, "
        "which is how jobs are chained here; DiLoCo keeps them on its workers.",
        [""],
    )


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
