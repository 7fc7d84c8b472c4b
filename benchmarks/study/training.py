"""Local training of a whole cohort at once: every client by its own batches, schedule, clipping and AdamW.

The recipe is the product's (edge_client/training/recipe.py), in float32. What the product's clients do not have, and
multi-round methods ask of them, is an argument here: FedProx's pull to where the round began, and SCAFFOLD's
correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.adapter import Adapter, LowRank, initial
from converters.architectures import Shape
from edge_client.data.batches import Batch, Batches, padded
from edge_client.data.tokenize import Example
from edge_client.training.recipe import Recipe

from .llama import Llama

TOKENS_AT_ONCE = 8192  # of all clients together, as padded


@dataclass(frozen=True)
class Space:
    """The factors of an adapter as one vector (P,): each module's A (r, in), then its B (out, r), by sorted names.

    ΔW = scaling · B A, as while training; the common layout has the scaling folded into B.
    """

    shapes: Mapping[str, Shape]
    rank: int
    scaling: float

    @property
    def size(self) -> int:
        return sum(self.rank * (shape.into + shape.out) for shape in self.shapes.values())

    def factors(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views (C, r, in) and (C, out, r) of vectors (C, P), by module."""
        found, at = {}, 0
        for name, shape in sorted(self.shapes.items()):
            parts = []
            for size in ((self.rank, shape.into), (shape.out, self.rank)):
                parts.append(flat[:, at : at + size[0] * size[1]].unflatten(1, size))
                at += size[0] * size[1]
            found[name] = (parts[0], parts[1])
        return found

    def initial(self, seed: int) -> Tensor:
        """Where every client of a job starts (P,): the adapter that a coordinator hands out for this seed."""
        return self.vector(initial(self.shapes, self.rank, seed))

    def vector(self, adapter: Adapter) -> Tensor:
        flat = torch.empty(1, self.size)
        for name, (a, b) in self.factors(flat).items():
            update = adapter.modules[name]
            a.copy_(torch.tensor(update.a)[None])
            b.copy_(torch.tensor(update.b)[None] / self.scaling)
        return flat[0]

    def adapter(self, vector: Tensor) -> Adapter:
        """In the common layout."""
        found = self.factors(vector[None])
        return Adapter({name: LowRank(a[0].numpy(), (b[0] * self.scaling).numpy()) for name, (a, b) in found.items()})

    def of_b(self) -> Tensor:
        """Which numbers of a vector belong to a B (P,), bool."""
        flat = torch.zeros(1, self.size, dtype=torch.bool)
        for _, b in self.factors(flat).values():
            b.fill_(True)
        return flat[0]


@dataclass(frozen=True)
class Trained:
    """Every client's factors (C, P), and the mean of the gradients that it met (C, P), before anything was added."""

    vectors: Tensor
    mean_gradients: Tensor


def train(
    llama: Llama,
    space: Space,
    start: Tensor,
    plans: Sequence[Batches],
    recipes: Sequence[Recipe],
    *,
    proximal: float = 0.0,
    corrections: Tensor | None = None,
) -> Trained:
    """Every client from `start` (P,) through its own plan, by its own recipe.

    `proximal`: FedProx's μ (arXiv 1812.06127), the gradient of μ/2·‖w − start‖². `corrections` (C, P): added to each
    client's gradients, as SCAFFOLD does (arXiv 1910.06378).
    """
    order = sorted(range(len(plans)), key=lambda i: -plans[i].total_steps)  # who is still at work comes first
    vectors, gradients = torch.empty(len(plans), space.size), torch.empty(len(plans), space.size)
    at_once = max(1, TOKENS_AT_ONCE // max(_tokens_of_a_step(plan) for plan in plans))
    for begin in range(0, len(order), at_once):
        some = order[begin : begin + at_once]
        vectors[some], gradients[some] = _train(
            llama,
            space,
            start,
            [plans[i] for i in some],
            [recipes[i] for i in some],
            proximal,
            None if corrections is None else corrections[some],
        )
    return Trained(vectors, gradients)


def _tokens_of_a_step(plan: Batches) -> int:
    return min(plan.batch_size, plan.num_examples) * max(len(example.ids) for example in plan.examples)


def _train(
    llama: Llama,
    space: Space,
    start: Tensor,
    plans: Sequence[Batches],
    recipes: Sequence[Recipe],
    proximal: float,
    corrections: Tensor | None,
) -> tuple[Tensor, Tensor]:
    clients, recipe = len(plans), recipes[0]
    weights, grad = start.repeat(clients, 1), torch.zeros(clients, space.size)
    first, second, met = torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros_like(weights)
    leaves, leaf_grads = space.factors(weights), space.factors(grad)
    frozen = ~space.of_b() if recipe.freeze_a else None
    for step in range(plans[0].total_steps):
        active = sum(plan.total_steps > step for plan in plans)
        batch = _together([plan.batch(step) for plan in plans[:active]])
        live = {}
        for name, (a, b) in leaves.items():
            live[name] = (a[:active].detach().requires_grad_(), b[:active].detach().requires_grad_())
        scaled = {name: (a, space.scaling * b) for name, (a, b) in live.items()}
        hidden = llama.hidden(batch.inputs, scaled)
        at_targets = hidden.flatten(0, 2)[batch.targets]
        _, back = llama.losses(at_targets.detach(), batch.targeted, batch.shares)
        torch.autograd.backward(at_targets, back)
        for name, pair in live.items():
            for leaf, its_grad in zip(pair, leaf_grads[name], strict=True):
                assert leaf.grad is not None, "every factor has a say"
                its_grad[:active] = leaf.grad

        g, w, m, v = grad[:active], weights[:active], first[:active], second[:active]
        if frozen is not None:
            g[:, frozen] = 0.0
        met[:active] += g
        if proximal:
            g.add_(w - start, alpha=proximal)
        if corrections is not None:
            g.add_(corrections[:active])
        g.mul_((recipe.clip_norm / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
        one, two = recipe.betas
        m.lerp_(g, 1 - one)
        v.mul_(two).addcmul_(g, g, value=1 - two)
        rates = torch.tensor([each.learning_rate(step) for each in recipes[:active]])[:, None] / (1 - one ** (step + 1))
        w.sub_(rates * m / (v.sqrt() / (1 - two ** (step + 1)) ** 0.5 + recipe.eps))
    steps = torch.tensor([float(plan.total_steps) for plan in plans])[:, None]
    return weights, met / steps


@dataclass(frozen=True)
class _Batch:
    inputs: Tensor  # (C, N, T)
    targets: Tensor  # where they stand in the flattened (C·N·T)
    targeted: Tensor  # (targets,)
    shares: Tensor  # (targets,): one over how many targets its client has


def _together(batches: Sequence[Batch]) -> _Batch:
    """Every client's batch in one box."""
    shape = (len(batches), *(max(one.inputs.shape[axis] for one in batches) for axis in (0, 1)))
    inputs, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    shares = np.zeros(shape, np.float32)
    for at, one in enumerate(batches):
        rows, length = one.inputs.shape
        inputs[at, :rows, :length], labels[at, :rows, :length] = one.inputs, one.labels
        shares[at, :rows, :length] = one.mask / one.num_targets
    targets = np.flatnonzero(shares)
    found = (inputs, targets, labels.reshape(-1)[targets], shares.reshape(-1)[targets])
    return _Batch(*map(torch.from_numpy, found))


@torch.no_grad()
def evaluate(llama: Llama, examples: Sequence[Example]) -> float:
    """Loss in nats per target token."""
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for begin in range(0, len(ordered), 64):
        batch = padded(ordered[begin : begin + 64])
        hidden = llama.hidden(torch.from_numpy(batch.inputs)[None].long())
        losses, _ = llama.losses(*_at_targets(hidden, batch))
        total += float(losses.double().sum())
        count += batch.num_targets
    return total / count


def _at_targets(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (targets, D) and labels (targets,)."""
    return hidden.flatten(0, 2)[torch.from_numpy(batch.targets)], torch.from_numpy(batch.targeted).long()


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW (out, in) by module."""
    return {name: torch.from_numpy(update.delta()) for name, update in adapter.modules.items()}


def gradient(llama: Llama, names: Sequence[str], examples: Sequence[Example]) -> NDArray[np.float32]:
    """∇F of the mean loss per target by the dense weights of these modules, as one vector."""
    leaves = {f"{name}.weight": llama.weights[f"{name}.weight"].clone().requires_grad_() for name in names}
    model = Llama(llama.config, {**llama.weights, **leaves})
    count = sum(example.num_targets for example in examples)
    for begin in range(0, len(examples), 64):
        batch = padded(examples[begin : begin + 64])
        hidden = model.hidden(torch.from_numpy(batch.inputs)[None].long())
        at_targets, labels = _at_targets(hidden, batch)
        _, back = model.losses(at_targets.detach(), labels, torch.full((len(labels),), 1 / count))
        torch.autograd.backward(at_targets, back)
    return np.concatenate([leaf.grad.reshape(-1).numpy() for leaf in leaves.values() if leaf.grad is not None])
