"""Several rounds: a chain of one-round jobs. What the server does between two, and what clients are asked to do.

Vectors are factors (P,), as in FedAvg for LoRA: all clients start from one adapter of rank r, and so does the next job.
A client's optimizer begins anew with every job, as it does in the product; the schedule too, unless it is continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coordinator.aggregate import ClientUpdate, aggregate
from edge_client.data.batches import Batches
from edge_client.data.tokenize import Example
from edge_client.training.recipe import Recipe

from .llama import Llama
from .training import Space, train


@dataclass
class Server:
    """What an algorithm keeps from round to round (P,); zeros at first."""

    first: Tensor
    second: Tensor


# (server, pseudo-gradient step: mean of what clients changed (P,), server learning rate) → what is added (P,).
Step = Callable[[Server, Tensor, float], Tensor]


def fedavg(server: Server, change: Tensor, rate: float) -> Tensor:
    """The mean, arXiv 1602.05629; with another rate than 1, its server learning rate."""
    return rate * change


def fedavgm(server: Server, change: Tensor, rate: float) -> Tensor:
    """Heavy-ball momentum of 0.9, arXiv 1909.06335."""
    server.first.mul_(0.9).add_(change)
    return rate * server.first


def fedadam(server: Server, change: Tensor, rate: float) -> Tensor:
    """arXiv 2003.00295: β 0.9 and 0.99, no bias correction."""
    server.first.lerp_(change, 0.1)
    server.second.mul_(0.99).addcmul_(change, change, value=0.01)
    return rate * server.first / (server.second.sqrt() + ADAPTIVITY)


def fedyogi(server: Server, change: Tensor, rate: float) -> Tensor:
    """arXiv 2003.00295: as FedAdam, and the second moment moves by the sign of its error."""
    server.first.lerp_(change, 0.1)
    squared = change * change
    server.second.sub_(0.01 * squared * torch.sign(server.second - squared))
    return rate * server.first / (server.second.sqrt() + ADAPTIVITY)


def diloco(server: Server, change: Tensor, rate: float) -> Tensor:
    """Nesterov momentum of 0.9 outside, arXiv 2311.08105; its rate is 0.7."""
    server.first.mul_(0.9).add_(change)
    return rate * (change + 0.9 * server.first)


ADAPTIVITY = 1e-3  # τ, as in the paper's experiments


@dataclass(frozen=True)
class Algorithm:
    """What the server does, its usual server learning rate, and what clients do besides."""

    step: Step
    server_learning_rate: float = 1.0
    proximal: float = 0.0  # FedProx's μ
    control_variates: bool = False  # SCAFFOLD
    products: bool = False  # averages ΔW rather than factors, and truncates to the clients' rank: the product's `svd`


ALGORITHMS = {
    "fedavg": Algorithm(fedavg),
    "fedavgm": Algorithm(fedavgm),
    "fedadam": Algorithm(fedadam, 3e-3),
    "fedyogi": Algorithm(fedyogi, 3e-3),
    "fedprox": Algorithm(fedavg, proximal=0.1),
    "scaffold": Algorithm(fedavg, control_variates=True),
    "diloco": Algorithm(diloco, 0.7),
    "fedavg of ΔW, svd": Algorithm(fedavg, products=True),
}


@dataclass(frozen=True)
class Plan:
    """What every client does in all rounds together. `continued`: the schedule runs over all rounds, not in each."""

    epochs: float
    batch_size: int
    seed: int
    rounds: int = 1
    continued: bool = False

    def batches(self, examples: Sequence[Example], round_: int) -> Batches:
        """A client's batches of one round. Every round draws its own order, as every job has a seed of its own."""
        return Batches(examples, self.batch_size, self.epochs / self.rounds, self.seed + 1000 * round_)

    def recipe(self, recipe: Recipe, steps: int, round_: int) -> Recipe:
        if not self.continued:
            return replace(recipe, total_steps=steps)
        return _Part(**{**vars(recipe), "total_steps": steps * self.rounds}, begin=steps * round_)


@dataclass(frozen=True)
class _Part(Recipe):
    """A part of a longer run."""

    begin: int = 0

    def learning_rate(self, step: int) -> float:
        return super().learning_rate(self.begin + step)


def run(
    llama: Llama,
    space: Space,
    start: Tensor,
    clients: Sequence[Sequence[Example]],
    plan: Plan,
    recipe: Recipe,
    algorithm: Algorithm,
    after_round: Callable[[int, Tensor], None] = lambda round_, vector: None,
) -> Tensor:
    """The adapter (P,) after all rounds. `after_round` is given each round's, rounds counted from 1.

    Clients count by their examples. SCAFFOLD's control variates are the means of the gradients that a client met in
    the round before, which is its second option where clients take plain gradient steps.
    """
    counts = torch.tensor([float(len(examples)) for examples in clients])
    shares = (counts / counts.sum())[:, None]
    server = Server(torch.zeros_like(start), torch.zeros_like(start))
    current, variates = start.clone(), torch.zeros(len(clients), len(start))
    for round_ in range(plan.rounds):
        plans = [plan.batches(examples, round_) for examples in clients]
        recipes = [plan.recipe(recipe, one.total_steps, round_) for one in plans]
        corrections = (shares * variates).sum(0) - variates if algorithm.control_variates and round_ else None
        found = train(llama, space, current, plans, recipes, proximal=algorithm.proximal, corrections=corrections)
        mean = _mean_product(space, found.vectors, clients) if algorithm.products else (shares * found.vectors).sum(0)
        current = current + algorithm.step(server, mean - current, algorithm.server_learning_rate)
        variates = found.mean_gradients
        after_round(round_ + 1, current)
    return current


def _mean_product(space: Space, vectors: Tensor, clients: Sequence[Sequence[Example]]) -> Tensor:
    """The best adapter of the clients' rank for the mean of their ΔW (P,)."""
    sent = [ClientUpdate(space.adapter(one), len(examples)) for one, examples in zip(vectors, clients, strict=True)]
    return space.vector(aggregate(sent, "svd", rank=space.rank).adapter)
