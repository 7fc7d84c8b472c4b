"""How good the models of against_flower.py are: base + adapter on everybody's held-out rows, the same way for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from served import JOB, say
from torch.nn import functional
from transformers import AutoModelForCausalLM

from converters import adapter
from converters.adapter import Adapter
from coordinator.aggregate import ClientUpdate, aggregate
from edge_client import outbox
from edge_client.data import tokenize
from edge_client.data.batches import padded

from .both_sides import Found, Kill, Side, Task, measured

Opened = Callable[[Task, Path], AbstractContextManager[Side]]


class Judge:
    """Runs arms, and says how good their models are."""

    def __init__(self, task: Task, work: Path) -> None:
        self._task, self._work, self._count = task, work, 0
        tokenizer = tokenize.load_tokenizer(task.base)
        rows = [row for name in task.clients for row in tokenize.load(task.data / name).held_out]
        self._rows = tokenize.tokenise(rows, tokenizer, task.sequence).examples
        self.tokens = sum(row.num_targets for row in self._rows)
        self._sent: dict[int, Adapter] = {}  # FedAvg of what our clients sent, by seed
        self._base = AutoModelForCausalLM.from_pretrained(str(task.base), dtype=torch.float32).eval()
        self._weights = {
            name: linear.weight for name, linear in self._base.named_modules() if hasattr(linear, "weight")
        }

    def run(self, arm: str, opened: Opened, task: Task, kill: Kill | None = None) -> Found:
        say(f"{arm}, seed {task.seed}" + (f", {kill.client} is killed" if kill else ""))
        self._count += 1
        out = self._work / f"{self._count:02}-{arm.replace(' ', '-').replace(',', '')}"
        found = measured(opened(task, out), task, kill)
        published = found.pop("adapter")
        loss = self.loss(published)
        say(f"  loss {loss:.4f}")
        if arm == "oneround" and not kill:
            self._sent[task.seed] = self._averaged(found["clients"])
        if arm == "flower T=1" and not kill:
            found["fedavg_of_our_clients"] = self._beside(self._sent[task.seed], published)
        found.pop("clients", None)
        rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}
        return {"arm": arm, "seed": task.seed, "loss": loss} | rounded

    @torch.no_grad()
    def loss(self, update: Adapter | None = None) -> float:
        """Of the base with an adapter, in nats per held-out token."""
        changed = update.modules if update else {}
        before = {name: self._weights[name].clone() for name in changed}
        for name in changed:
            self._weights[name] += torch.from_numpy(changed[name].delta())
        total = 0.0
        for start in range(0, len(self._rows), 8):
            batch = padded(self._rows[start : start + 8])
            logits = self._base(input_ids=torch.from_numpy(batch.inputs).long(), use_cache=False).logits
            labels = torch.from_numpy(batch.targeted).long()
            total += float(functional.cross_entropy(logits[torch.from_numpy(batch.mask)], labels, reduction="sum"))
        for name, weight in before.items():
            self._weights[name].copy_(weight)
        return round(total / self.tokens, 5)

    def _averaged(self, clients: Path) -> Adapter:
        sent = []
        for name in self._task.clients:
            box = outbox.find(clients / name, JOB)
            declared = box.trained()
            assert declared is not None, "the round is over"
            sent.append(ClientUpdate(adapter.read(box.adapter), declared.num_examples))
        return aggregate(sent, "fedavg").adapter

    def _beside(self, ours: Adapter, flower: Adapter) -> Found:
        """Is it the same work? FedAvg of what our clients sent is Flower's first round, but for bfloat16 on our way."""
        pairs = [(ours.modules[name].delta(), flower.modules[name].delta()) for name in flower.modules]
        off = sum(float(np.sum((a - b) ** 2)) for a, b in pairs) / sum(float(np.sum(b**2)) for _, b in pairs)
        return {"loss": self.loss(ours), "relative_difference": round(float(np.sqrt(off)), 5)}
