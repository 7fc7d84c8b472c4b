"""The same work with Flower (flower.ai): one round here beside its federated averaging, each as it is deployed.

Clients each hold one package of Python's standard library and fine-tune benchmarks/base with LoRA of all linear layers.
Both sides train by the same function, `edge_client.backends.torch.train`, over the same batches at the same learning
rates, from the same initial adapter:

- oneround: `coordinator serve` and an `edge-client join` per client; one round, method `exact`. It ends with a merged
  GGUF that llama.cpp has verified.
- flower T=1: a SuperLink, a SuperNode per client, and `flwr run`; Flower's FedAvg over the factors A and B.
- flower T=3: the same steps in three rounds. Batches and schedule go on through them, the optimizer starts anew.

Then a client is killed (SIGKILL, all of its processes) in the middle of its training, and started again or not.

Both go over TLS on loopback; base and data are on the clients' disks beforehand. Loss is per token over all clients'
held-out rows, of base + adapter in float32. Bytes are those of the clients' TCP connections. Server memory is the
largest resident set of `coordinator` or `flower-superlink`, and of the processes that these start, together.

    python benchmarks/against_flower.py --quick      # some ten minutes on two cores that are free
    python benchmarks/against_flower.py              # three seeds, more clients and data, and all arms

Flower gets an environment of its own, under --work, with the versions in flower/constraints.txt: the first time takes
some minutes and 2 GB. Prints one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import stdlib_packages as packages
from flower.both_sides import Found, Kill, Task
from flower.environment import environment, versions
from flower.judge import Judge, Opened
from flower.our_side import SAVE_EVERY, coordinator
from flower.their_side import superlink

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ("asyncio", "email", "xml", "http")  # none of them was in the base's pretraining
RESTART = 5.0  # seconds
ROUNDS = (1, 3)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "benchmarks" / "base", help="a model's folder")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="a folder to work in")
    parser.add_argument("--quick", action="store_true", help="three clients, little data, one seed, fewer arms")
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: 3, with --quick 1)")
    parser.add_argument("--json", type=Path, help="write the document there as well")
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    clients = CLIENTS[:3] if asked.quick else CLIENTS
    size, held_out = (50_000, 12_000) if asked.quick else (160_000, 25_000)  # bytes of source, per client
    work = asked.work.resolve() / "against-flower"
    shutil.rmtree(work, ignore_errors=True)
    for name in clients:
        packages.split(name, work / "data" / name, train_bytes=size, held_out_bytes=held_out)
    flower_folder = asked.work.resolve() / "flower-env"
    variables = environment(flower_folder)
    warm(variables)
    task = Task(asked.base.resolve(), work / "data", clients, quorum=len(clients) - 1, seed=0, epochs=2)
    judge = Judge(task, work)

    def flower(rounds: int) -> Opened:
        return lambda task, out: superlink(task, out, rounds, variables)

    arms: dict[str, Opened] = {"oneround": coordinator} | {f"flower T={rounds}": flower(rounds) for rounds in ROUNDS}
    runs = []
    for seed in range(asked.seeds or (1 if asked.quick else 3)):
        runs += [judge.run(name, opened, replace(task, seed=seed)) for name, opened in arms.items()]
    if not asked.quick:
        runs.append(judge.run("oneround, float32", lambda task, out: coordinator(task, out, "float32"), task))
    killed = []
    for again_after in (RESTART, None):
        for name, opened in arms.items():
            if name != "flower T=3" or not asked.quick:
                killed.append(judge.run(name, opened, task, Kill(clients[1], again_after=again_after)))

    document = {
        "losses": spread(runs) | {"base": judge.loss()},
        "ratios": ratios(runs),
        "runs": runs,
        "killed": killed,
        "settings": {
            **{key: value for key, value in asdict(task).items() if key not in ("base", "data", "seed")},
            "bytes_of_source_per_client": size,
            "held_out_tokens": judge.tokens,
            "snapshot_every_seconds": SAVE_EVERY,
            "restart_after_seconds": RESTART,
            "flower": "TLS, SuperLink's and SuperNodes' defaults, FedAvg without evaluation on clients, float32",
        },
        "versions": {"here": {name: metadata.version(name) for name in PACKAGES}}
        | {"flower's environment": versions(flower_folder, "flwr", *PACKAGES)},
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_now": os.getloadavg(),
        },
    }
    text = json.dumps(document, indent=2, default=str)
    if asked.json:
        asked.json.write_text(text + "\n")
    print(text)


PACKAGES = ("torch", "transformers", "peft", "numpy", "grpcio", "protobuf")


def warm(variables: dict[str, str]) -> None:
    """Both environments' libraries into the page cache, so that the first run pays for none."""
    both = "import torch, transformers, peft, edge_client.backends.torch"
    subprocess.run([sys.executable, "-c", both], check=True)
    python = shutil.which("python", path=variables["PATH"])
    subprocess.run([str(python), "-c", f"{both}, flwr.serverapp, flwr.clientapp, uvicorn"], check=True, env=variables)


def spread(runs: Sequence[Found]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each arm's loss over seeds."""
    by_arm: dict[str, list[float]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], []).append(run["loss"])
    return {
        arm: {
            "mean": round(statistics.mean(losses), 5),
            "sd": round(statistics.stdev(losses), 5) if len(losses) > 1 else 0.0,
            "seeds": len(losses),
        }
        for arm, losses in by_arm.items()
    }


def ratios(runs: Sequence[Found]) -> dict[str, dict[str, float]]:
    """Flower's over ours, medians over seeds."""

    def median(arm: str, of: Callable[[Found], float]) -> float:
        return statistics.median(of(run) for run in runs if run["arm"] == arm)

    figures: dict[str, Callable[[Found], float]] = {
        "bytes_up": lambda run: run["bytes_up"],
        "bytes_down": lambda run: run["bytes_down"],
        "bytes": lambda run: run["bytes_up"] + run["bytes_down"],
        "seconds_to_model": lambda run: run["seconds_to_model"],
        "seconds_from_first_step": lambda run: run["seconds_from_first_step"],
        "server_memory": lambda run: run["server"]["peak_mb"] + run["server"]["children_peak_mb"],
    }
    return {
        f"flower T={rounds}": {
            name: round(median(f"flower T={rounds}", of) / median("oneround", of), 3) for name, of in figures.items()
        }
        for rounds in ROUNDS
    }


if __name__ == "__main__":
    main()
