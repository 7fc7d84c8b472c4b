"""The report's sections on what it hangs on, and what it costs: sweeps, the paper's measurements, bytes, time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import time_to_model

from . import plots, presets
from .cells import CENTRALISED, FROZEN, ONE_SHOT, Cell
from .comparisons import pairs, shares
from .markdown import Section, percent, said, table, titled
from .measure import BASES, UNPRETRAINED, Llama
from .plots import Panel
from .presets import MAIN, PACKAGES, SPEAKERS
from .results import Results, Spread
from .tasks import TASKS

MEASURED = Path(__file__).resolve().parents[1] / "results"  # by the other benchmarks


def lines(
    results: Results,
    change: Callable[[Cell, Any], Cell],
    values: Sequence[Any],
    arms: Mapping[str, Cell],
    at: Callable[[Any], float],
) -> dict[str, list[tuple[float, Spread]]]:
    """For each arm the losses, over what a value changes of it."""
    return {
        name: [(at(value), loss) for value in values if (loss := results.loss(change(cell, value)))]
        for name, cell in arms.items()
    }


def rounds_of(task: str) -> dict[str, Cell]:
    """One round, and several."""
    return {
        "one round": Cell(MAIN, task, ONE_SHOT),
        "T = 3": Cell(MAIN, task, "fedavg", rounds=3),
        "T = 10": Cell(MAIN, task, "fedavg", rounds=10),
    }


def cohort_panels(results: Results, task: str) -> list[Panel]:
    """Test loss over the number of clients, and over how data is dealt to them."""
    arms = rounds_of(task)
    alphas = ("0.1", "0.5", "1", "inf")
    many = {"examples": presets.MANY, "epochs": presets.MANY_EPOCHS}
    return [
        Panel(
            lines(
                results,
                lambda cell, count: replace(cell, clients=count, **many),
                presets.CLIENTS,
                {"one round": arms["one round"], "T = 5": replace(arms["T = 3"], rounds=5)},
                float,
            ),
            f"clients, of {presets.MANY:,} examples in all",
            "clients",
            "test loss",
            log=True,
            ticks=[(float(n), str(n)) for n in presets.CLIENTS],
        ),
        Panel(
            lines(results, lambda cell, alpha: replace(cell, dealt=alpha), alphas, arms, lambda a: alphas.index(a)),
            "Dirichlet's α (speakers)",
            "α",
            "test loss",
            ticks=[(float(at), {"inf": "∞"}.get(alpha, alpha)) for at, alpha in enumerate(alphas)],
        ),
    ]


def recipe_panels(results: Results, task: str) -> list[Panel]:
    """Test loss over local epochs and over rank."""
    arms, epochs_of_task = rounds_of(task), TASKS[task].epochs
    pooled = {"centralised": Cell(MAIN, task, CENTRALISED)}
    return [
        Panel(
            lines(
                results,
                lambda cell, epochs: presets.times(cell, 1.0, epochs),
                presets.LOCAL_EPOCHS,
                {**arms, **pooled},
                lambda epochs: epochs * epochs_of_task,
            ),
            "local epochs in all",
            "epochs",
            "test loss",
            log=True,
            ticks=[(epochs * epochs_of_task, f"{epochs * epochs_of_task:g}") for epochs in presets.LOCAL_EPOCHS],
        ),
        Panel(
            lines(
                results,
                lambda cell, rank: replace(cell, rank=rank),
                presets.RANKS,
                {name: arms[name] for name in ("one round", "T = 3")} | pooled,
                float,
            ),
            "rank",
            "rank",
            "test loss",
            log=True,
            ticks=[(float(rank), str(rank)) for rank in presets.RANKS],
        ),
    ]


def sweeps(results: Results, out: Path) -> Section:
    panels = [*cohort_panels(results, SPEAKERS), *recipe_panels(results, SPEAKERS)]
    rows: list[str] = []
    for panel in panels:
        xs = [said_x for _, said_x in panel.ticks]
        body = [[name, *(said(dict(line).get(at)) for at, _ in panel.ticks)] for name, line in panel.lines.items()]
        rows += table([panel.title, *xs], body)
    picture = "sweeps.png" if plots.write(out / "sweeps.png", panels) else ""
    yield from titled(
        "Sweeps",
        f"Base {MAIN}, {SPEAKERS}, test losses. Clients: the same examples cut finer, laid by speaker. Dirichlet: who "
        "has how much of each speaker, of twenty draws the one whose smallest client has most; ∞ is at random. "
        "Epochs: at the same learning rate.",
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
        ("one round, `ffa`", Cell(MAIN, "", FROZEN), "ffa", tuple(wire["ffa"][target] for target in ways)),
        ("one round, `exact`", Cell(MAIN, "", ONE_SHOT), "exact", tuple(wire["exact"][target] for target in ways)),
    ]
    for rounds in presets.MORE_ROUNDS:
        passed = tuple(first[target] + (rounds - 1) * further[target] for target in ways)
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
