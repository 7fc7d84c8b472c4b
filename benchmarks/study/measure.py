"""A cell's setting → what is measured of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.adapter import Adapter
from coordinator.aggregate import METHODS, ClientUpdate, aggregate
from edge_client.data.batches import Batches
from edge_client.data.tokenize import load_tokenizer
from edge_client.training.recipe import Recipe
from oneround.errors import LayoutMismatch
from oneround.v1 import federation_pb2 as pb

from . import tasks
from .cells import CENTRALISED, FROZEN, ONE_SHOT, Cell
from .llama import Llama
from .rounds import ALGORITHMS, Plan, run
from .training import Space, dense, evaluate, gradient, train

BENCHMARKS = Path(__file__).resolve().parents[1]
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
BASES = {
    "0.3M": BENCHMARKS / "siblings" / "0.3M",
    "1.3M": BENCHMARKS / "siblings" / "1.3M",
    "5M": BENCHMARKS / "base",
    "stories260K": STORIES,
}
UNPRETRAINED = ", unpretrained"
BATCH_SIZE = 4
ALPHA_OVER_RANK = 2.0  # so that ΔW's scaling does not change with the rank
LAMBDAS = (0.8, 1.2, 1.5, 2.0)  # of task-arithmetic, beside 1.0
BYZANTINE = 2  # that krum and trimmed-mean are told to bear, of ten
ORDERS = 5  # in which clients are added one after another
GRADIENT_EXAMPLES = 128
ARRIVAL_EXAMPLES = 64


def measured(cell: Cell) -> dict[str, Any]:
    """Losses on the test and validation sets and, in some cells, more. Everything follows from the cell."""
    torch.set_num_threads(1)
    if cell.algorithm == CENTRALISED:
        return _centralised(cell)
    return _one_shot(cell) if cell.algorithm in (ONE_SHOT, FROZEN) else _rounds(cell)


class Setting:
    """What a cell's training is given."""

    def __init__(self, cell: Cell) -> None:
        task = tasks.TASKS[cell.task]
        self.cell = cell = replace(
            cell,
            learning_rate=cell.learning_rate or task.learning_rate,
            epochs=cell.epochs or task.epochs,
            examples=cell.examples or task.examples,
        )
        self.llama = _base(cell.base)
        self.names = sorted(self.llama.shapes)
        self.space = Space(self.llama.shapes, cell.rank, ALPHA_OVER_RANK)
        self.start = self.space.initial(cell.seed)
        dealt = cell.dealt if cell.dealt in ("random", "groups") else float(cell.dealt) if cell.dealt else None
        self.data = tasks.federation(
            cell.task,
            _tokenizer(cell.base),
            clients=cell.clients,
            examples=cell.examples,
            seed=cell.seed,
            dealt=dealt,
        )
        self.recipe = Recipe(
            alpha=ALPHA_OVER_RANK * cell.rank,
            dropout=0.0,
            peak_learning_rate=cell.learning_rate,
            schedule="linear",
            warmup_steps=0,
            total_steps=1,
            seed=cell.seed,
            freeze_a=cell.algorithm == FROZEN,
        )
        self.plan = Plan(cell.epochs, BATCH_SIZE, cell.seed, cell.rounds, cell.continued)

    def contributions(self) -> list[ClientUpdate]:
        """What each client sends after training by itself."""
        plans = [self.plan.batches(examples, 0) for examples in self.data.train]
        recipes = [self.plan.recipe(self.recipe, plan.total_steps, 0) for plan in plans]
        vectors = train(self.llama, self.space, self.start, plans, recipes).vectors
        counts = map(len, self.data.train)
        return [ClientUpdate(self.space.adapter(one), count) for one, count in zip(vectors, counts, strict=True)]

    def losses(self, adapter: Adapter | None) -> dict[str, float]:
        """Of base + adapter, or of the base."""
        llama = self.llama.merged(dense(adapter)) if adapter else self.llama
        return {
            "test": round(evaluate(llama, self.data.test), 5),
            "valid": round(evaluate(llama, self.data.valid), 5),
        }


def _centralised(cell: Cell) -> dict[str, Any]:
    """Everybody's examples in one place, as many passes over them."""
    setting = Setting(cell)
    pooled = [one for mine in setting.data.train for one in mine]
    plan = Batches(pooled, BATCH_SIZE, setting.cell.epochs, cell.seed)
    recipe = replace(setting.recipe, total_steps=plan.total_steps)
    found = train(setting.llama, setting.space, setting.start, [plan], [recipe])
    adapter = setting.space.adapter(found.vectors[0])
    return {"losses": {"base": setting.losses(None), "centralised": setting.losses(adapter)}, "steps": plan.total_steps}


def _rounds(cell: Cell) -> dict[str, Any]:
    setting = Setting(cell)
    algorithm = ALGORITHMS[cell.algorithm]
    if cell.server_learning_rate:
        algorithm = replace(algorithm, server_learning_rate=cell.server_learning_rate)
    by_round: list[float] = []

    def after(round_: int, vector: torch.Tensor) -> None:
        if cell.rounds <= 10:
            llama = setting.llama.merged(dense(setting.space.adapter(vector)))
            by_round.append(round(evaluate(llama, setting.data.valid), 5))

    run_ = (setting.llama, setting.space, setting.start, setting.data.train, setting.plan, setting.recipe)
    final = setting.space.adapter(run(*run_, algorithm, after))
    result: dict[str, Any] = {"losses": {"multi-round": setting.losses(final)}, "valid_by_round": by_round}
    if _is_plain(cell) and cell.algorithm == "fedavg" and cell.rounds == 3:
        once = Setting(replace(cell, rounds=1))
        result["bound"] = _bound(setting, final, once.contributions(), cell)
    return result


def _is_plain(cell: Cell) -> bool:
    """Nothing about it but its base, task, algorithm, rounds and seed is special."""
    return cell == Cell(cell.base, cell.task, cell.algorithm, cell.seed, cell.rounds)


def _one_shot(cell: Cell) -> dict[str, Any]:
    setting = Setting(cell)
    sent = setting.contributions()
    result: dict[str, Any] = {"losses": {"base": setting.losses(None)}, "unfit": {}, "energy_kept": {}}
    frozen = cell.algorithm == FROZEN
    for arm, how in _methods(frozen).items():
        try:
            with tempfile.TemporaryDirectory() as scratch:
                found = aggregate(sent, how, rank=cell.rank if how.method == "svd" else 0, scratch=Path(scratch))
                result["losses"][arm] = setting.losses(found.adapter)
        except LayoutMismatch as error:
            result["unfit"][arm] = str(error)
            continue
        if found.energy_kept < 1:
            result["energy_kept"][arm] = round(found.energy_kept, 4)
    if not frozen:
        result["local"] = [setting.losses(one.adapter) for one in sent]
        if _is_plain(cell):
            result["arrivals"] = _arrivals(setting, sent)
    return result


def _methods(frozen: bool) -> dict[str, pb.AggregateSpec]:
    """Every aggregation method, with the defaults of a job; `exact` with other server learning rates too."""
    found = {}
    for name, method in METHODS.items():
        if method.needs_frozen_a == frozen and name != "task-arithmetic":
            found[name] = pb.AggregateSpec(method=name)
            if "byzantine_clients" in method.parameters:
                found[name].byzantine_clients = BYZANTINE
    if not frozen:
        for rate in LAMBDAS:
            found[f"task-arithmetic × {rate:g}"] = pb.AggregateSpec(method="task-arithmetic", server_learning_rate=rate)
    return found


def _arrivals(setting: Setting, sent: Sequence[ClientUpdate]) -> list[list[float]]:
    """Validation loss of `exact` over the first 1, 2, … clients, in several random orders; the paper's Figure 5."""
    rng = np.random.default_rng([setting.cell.seed, 5])
    changes = [dense(one.adapter) for one in sent]
    some = setting.data.valid[:: max(1, len(setting.data.valid) // ARRIVAL_EXAMPLES)]
    curves = []
    for _ in range(ORDERS):
        order, curve = rng.permutation(len(sent)), []
        total, count = {name: torch.zeros(*shape) for name, shape in setting.llama.shapes.items()}, 0
        for client in order:
            count += sent[client].num_examples
            for name in total:
                total[name] += sent[client].num_examples * changes[client][name]
            llama = setting.llama.merged({name: change / count for name, change in total.items()})
            curve.append(round(evaluate(llama, some), 4))
        curves.append(curve)
    return curves


def _bound(setting: Setting, multi: Adapter, sent: Sequence[ClientUpdate], cell: Cell) -> dict[str, float]:
    """The paper's estimates, over the dense weights w of the adapted modules, and what they are to bound.

    smoothness L = ‖∇F(w₀) − ∇F(w_T)‖ / ‖w₀ − w_T‖ and update size τ = ‖w_T − w₀‖ / ‖w₀‖, where w_T is after T rounds
    and F is the loss on pooled training examples; ε = L·τ·Tk·‖w₀‖ with Tk local steps; and the observed ‖w_one − w_T‖,
    where w_one is the one-shot mean of equally many local steps.
    """
    rng = np.random.default_rng([cell.seed, 3])
    pooled = [one for mine in setting.data.train for one in mine]
    some = [pooled[i] for i in rng.permutation(len(pooled))[:GRADIENT_EXAMPLES]]
    one = aggregate(sent, "exact").adapter
    change, change_one = dense(multi), dense(one)
    before = gradient(setting.llama, setting.names, some)
    after = gradient(setting.llama.merged(change), setting.names, some)
    moved = float(np.sqrt(sum(float(change[name].square().sum()) for name in setting.names)))
    apart = float(np.sqrt(sum(float((change[name] - change_one[name]).square().sum()) for name in setting.names)))
    size = float(np.sqrt(sum(float(setting.llama.weights[f"{name}.weight"].square().sum()) for name in setting.names)))
    smoothness, update = float(np.linalg.norm(before - after)) / moved, moved / size
    steps = sum(setting.plan.batches(setting.data.train[0], round_).total_steps for round_ in range(cell.rounds))
    return {
        "smoothness": smoothness,
        "update_size": update,
        "norm": size,
        "local_steps": steps,
        "epsilon": smoothness * update * steps * size,
        "observed": apart,
        "observed_over_norm": apart / size,
    }


@lru_cache(maxsize=4)
def _base(name: str) -> Llama:
    folder = BASES[name.removesuffix(UNPRETRAINED)]
    return Llama.unpretrained(folder, seed=0) if name.endswith(UNPRETRAINED) else Llama.load(folder)


@lru_cache(maxsize=4)
def _tokenizer(name: str) -> Any:
    return load_tokenizer(BASES[name.removesuffix(UNPRETRAINED)])


def is_here(cell: Cell) -> bool:
    """Whether the base and the data of a cell are on this machine."""
    return BASES[cell.base.removesuffix(UNPRETRAINED)].exists() and tasks.available(cell.task)
