"""The server: Flower's own FedAvg over LoRA factors that all start from one shared A."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from converters import adapter
from lora_fedavg import records

app = ServerApp()


class Noted(FedAvg):
    """FedAvg that keeps how many clients' results each round had, and when."""

    def __init__(self, quorum: int) -> None:
        # No evaluation on the clients after each round, which is on by default: it would send the model once more.
        super().__init__(fraction_evaluate=0.0, min_train_nodes=quorum, min_available_nodes=quorum)
        self.rounds: list[dict[str, float]] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        results = sum(not reply.has_error() for reply in replies)
        self.rounds.append({"results": results, "failures": len(replies) - results, "at": time.time()})
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["clients"]):  # all take part in the first round
        time.sleep(0.5)
    strategy = Noted(int(config["quorum"]))
    result = strategy.start(
        grid,
        records.record(adapter.read(Path(str(config["initial"])))),
        num_rounds=int(config["rounds"]),
        timeout=float(config["timeout"]),
    )
    to = Path(str(config["result"]))
    adapter.write(records.adapter(result.arrays), to)
    to.with_suffix(".json").write_text(json.dumps(strategy.rounds))
