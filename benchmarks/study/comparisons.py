"""The report's sections on one round against many: what was done, losses, methods, algorithms, each arm at its best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import plots, presets
from .cells import CENTRALISED, FROZEN, ONE_SHOT, Cell
from .markdown import Section, percent, said, table, titled
from .measure import BASES, BATCH_SIZE, UNPRETRAINED, Llama
from .plots import Panel
from .presets import MAIN, PACKAGES, SPEAKERS
from .results import Results, Spread
from .rounds import ALGORITHMS
from .tasks import TASKS


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
