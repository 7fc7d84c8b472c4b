"""A client: `edge_client.backends.torch.train` over this round's share of the steps, on the data of its node."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_client.backends import Setup, torch
from edge_client.data import tokenize
from edge_client.data.batches import Batch, Batches
from edge_client.training.recipe import Recipe
from lora_fedavg import records

app = ClientApp()


class Share:
    """The batches of one round of several: together they are those of the whole run, in the same order."""

    def __init__(self, whole: Batches, number: int, rounds: int) -> None:
        self.first, last = (whole.total_steps * n // rounds for n in (number - 1, number))
        self.total_steps = last - self.first
        self._whole, self.loss = whole, whole.loss

    def batch(self, step: int) -> Batch:
        return self._whole.batch(self.first + step)


@dataclass(frozen=True)
class Later(Recipe):
    """A recipe from one of its steps on: rounds go on with the schedule, they do not start it again."""

    first: int = 0

    def learning_rate(self, step: int) -> float:
        return super().learning_rate(self.first + step)


@app.train()
def train(message: Message, context: Context) -> Message:
    run, node = context.run_config, context.node_config
    base, number = Path(str(run["base"])), int(message.content["config"]["server-round"])
    rows = tokenize.load(Path(str(node["data"])))
    tokenised = tokenize.tokenise(rows.train, tokenize.load_tokenizer(base), int(run["sequence"]))
    whole = Batches(tokenised.examples, int(run["batch-size"]), float(run["epochs"]), int(run["seed"]))
    share = Share(whole, number, int(run["rounds"]))
    recipe = Later(
        alpha=float(run["alpha"]),
        dropout=0.0,
        peak_learning_rate=float(run["learning-rate"]),
        schedule="linear",
        warmup_steps=0,
        total_steps=whole.total_steps,
        seed=int(run["seed"]),
        first=share.first,
    )
    with Path(str(node["log"])).open("a") as log:

        def note(done: int) -> None:
            step = {"at": time.time(), "done": share.first + done, "total": whole.total_steps}
            print(json.dumps(step), file=log, flush=True)

        note(0)
        received = records.adapter(message.content["arrays"])
        trained = torch.train(
            base, received, recipe, share, lambda progress: note(progress.step), setup=Setup(torch.precision())
        )
    metrics = MetricRecord({"num-examples": whole.num_examples})
    return Message(RecordDict({"arrays": records.record(trained), "metrics": metrics}), reply_to=message)
