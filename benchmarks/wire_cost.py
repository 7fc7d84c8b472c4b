"""What a round costs in bytes, counted on the wire between real clients and the real coordinator.

    python benchmarks/wire_cost.py --work build/wire        # some five minutes for each base

`coordinator serve` is a process of its own, with TLS. Each `edge-client join` reaches it over a wire that counts
(counted.py), has the base on its own disk (--model), and stays until the publication (--wait). Three arms:

- exact: one round, A and B sent in bfloat16;
- ffa: one round with A frozen, so that B alone is sent;
- chain: rounds of `fedavg`, each of which starts from what the one before it has published. Its figures are the mean of
  the rounds after the first, which is what each further round costs; all rounds are beside them.

By client: `adapter_bytes` is the file that goes up and `initial_bytes` the one that comes down; `other_up` and
`other_down` are everything else: TLS, gRPC, signing in, heartbeats, watching. What grows with time rather than with
rounds is measured by itself (`by_hour`), while one client trains and while it waits. Bytes do not depend on the data,
of which there is little, nor on how many clients there are. `pulled` is what `edge-client pull` takes afterwards.

Seconds stand beside the machine's load, and mean little where that was more than its cores. Writes one JSON document to
--out after each arm, and prints it last; `--keep --base … --arms …` measures a part of it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cohort import Client, run, wait_for
from wired import DATA, Arm, Site, console, prepare, site

from converters import tensors

Found = dict[str, Any]

ROOT = Path(__file__).resolve().parent
PATIENCE = 600.0  # seconds for a client to come to where it is measured


def arms(rounds: int) -> dict[str, Arm]:
    return {
        "exact": Arm("exact"),
        "ffa": Arm("ffa", "freeze_a = true"),
        "chain": Arm("fedavg", rounds=rounds),
    }


# ---- what is measured ----


def one_round(here: Site, job: str) -> Found:
    """Every client takes part in an open job, from joining to the publication; what that cost one of them, in bytes."""
    before = {name: wire.settled() for name, wire in here.wires.items()}
    began = time.monotonic()
    cohort = [here.client(name, job, threads=1) for name in DATA]
    wait_for(cohort)
    took = time.monotonic() - began
    passed = {name: wire.settled().since(before[name]) for name, wire in here.wires.items()}
    sizes = [client.said["receipt"]["size"] for client in cohort]
    initial = announced(here, job)
    status = here.status(job)
    published = status["publications"][0]
    last = max(client["contribution"]["received_unix"] for client in status["clients"])
    return {
        "up_per_client": mean(one.up for one in passed.values()),
        "down_per_client": mean(one.down for one in passed.values()),
        "adapter_bytes": mean(sizes),
        "initial_bytes": initial,
        "other_up": mean(passed[name].up - size for name, size in zip(passed, sizes, strict=True)),
        "other_down": mean(one.down - initial for one in passed.values()),
        "up": [one.up for one in passed.values()],
        "down": [one.down for one in passed.values()],
        "load": load(),
        "seconds": round(took, 1),
        "training_seconds": round(statistics.mean(client.said["trained"]["seconds"] for client in cohort), 2),
        "publish_seconds": round(published["published_unix"] - last, 2),
    }


def announced(here: Site, job: str) -> int:
    """Size of the adapter that all clients of a job have fetched, in bytes."""
    fetched = {file.stat().st_size for file in here.out.glob(f"clients/*/jobs/{job}*/initial.safetensors")}
    (size,) = fetched
    return size


def measured(here: Site, name: str, arm: Arm) -> Found:
    """An arm's cost per client: of its round, or of each further one."""
    rounds: list[Found] = []
    for number in range(arm.rounds):
        job = name if arm.rounds == 1 else f"{name}-{number + 1}"
        here.submit(job, arm, lora=f'start_from = "{name}-{number}"' if number else "")
        rounds.append(one_round(here, job))
        say(f"{here.base.name} {job}: {rounds[-1]['up_per_client']:,} up, {rounds[-1]['down_per_client']:,} down")
    if arm.rounds == 1:
        return rounds[0]
    further = {key: mean(one[key] for one in rounds[1:]) for key, value in rounds[0].items() if isinstance(value, int)}
    seconds = {key: rounds[-1][key] for key in ("load", "seconds", "training_seconds", "publish_seconds")}
    whole = {way: sum(one[f"{way}_per_client"] for one in rounds) for way in ("up", "down")}
    times = {way: round(whole[way] / rounds[0][f"{way}_per_client"], 3) for way in whole}
    return {**further, **seconds, "all_rounds": whole, "times_the_first": times, "rounds": rounds}


def pulled(here: Site, job: str, artifact: str) -> Found:
    """What `edge-client pull` takes of a publication: the named part, or without a name the merged GGUF."""
    wire = here.wires[DATA[0]]
    before = wire.settled()
    to = here.out / "pulled" / (artifact or "gguf")
    chosen = ["--artifact", artifact] if artifact else []
    reach = ["--server", wire.address, "--state", here.out / "clients" / DATA[0]]
    run("edge-client", "pull", job, *chosen, "--to", to, *reach)
    passed = wire.settled().since(before)
    signed = ("manifest.json", "manifest.json.signature")
    files = sum(file.stat().st_size for file in to.rglob("*") if file.is_file() and file.name not in signed)
    return {"up": passed.up, "down": passed.down, "file_bytes": files, "other_down": passed.down - files}


def by_hour(here: Site, seconds: float) -> Found:
    """What one client sends and gets by the hour while it trains and while it waits, and how long a step takes it."""
    here.submit("trains", Arm("exact"), epochs=1000, clients=2)
    training, steps = rate(here, here.client(DATA[0], "trains", threads=os.cpu_count() or 1), "training", seconds)
    busy = load()
    here.submit("waits", Arm("exact"), clients=2)
    waiting, _ = rate(here, here.client(DATA[0], "waits", threads=1), "waiting", seconds)
    each = round(training["seconds"] / steps, 4)
    return {"training": training, "waiting": waiting, "step_seconds": each, "load": busy}


def rate(here: Site, client: Client, doing: str, seconds: float) -> tuple[Found, int]:
    """Bytes by the hour while a client does this for so many seconds; and how many steps it makes meanwhile."""
    wire = here.wires[client.name]
    try:
        until = time.monotonic() + PATIENCE
        while not does(client, doing):
            if client.process.poll() is not None or time.monotonic() > until:
                sys.exit(f"client {client.name} never came to {doing}:\n{client.log.read_text()}")
            time.sleep(0.1)
        began, before, step = time.monotonic(), wire.passed, steps_done(client)
        time.sleep(seconds)
        took, passed = time.monotonic() - began, wire.passed.since(before)
        steps = steps_done(client) - step
    finally:
        client.process.terminate()
        client.process.wait()
        wire.settled()
    hourly = {way: round(count * 3600 / took) for way, count in passed._asdict().items()}
    return {**hourly, "seconds": round(took, 1)}, steps


def does(client: Client, what: str) -> bool:
    if what == "training":
        return bool(client.said.get("progress", {}).get("what") == "training")
    return what in client.said


def steps_done(client: Client) -> int:
    said = client.said.get("progress", {})
    return int(said["done"]) if said.get("what") == "training" else 0


# ---- all of it ----


def of_arm(base: Path, name: str, arm: Arm, work: Path) -> tuple[Found, Found]:
    """An arm's cost, and what is pulled afterwards. It has a coordinator of its own: clients ask for a list of all jobs
    that there are."""
    with site(work, f"{base.name}/{name}", base) as here:
        found = measured(here, name, arm)
        last = name if arm.rounds == 1 else f"{name}-{arm.rounds}"
        return found, {"peft": pulled(here, last, "peft"), "gguf": pulled(here, last, "")}


def parameters(base: Path) -> int:
    """Of all tensors in a base's files."""
    files = base.glob("*.safetensors")
    return sum(array.size for file in files for array in tensors.read(file)[0].values())


def mean(values: Iterator[int] | Sequence[int]) -> int:
    return round(statistics.mean(values))


def say(text: str) -> None:
    console.print(f"  {text}")


def load() -> float:
    """How many processes wanted to run during the last minute: what a measured second has to be held against."""
    return round(os.getloadavg()[0], 2)


def settings() -> Found:
    """What figures of one document have in common."""
    names = ("grpcio", "protobuf", "cryptography", "torch", "peft", "transformers", "llama_cpp_python", "numpy")
    return {
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in names},
        "clients": len(DATA),
        "rank": 16,
    }


def earlier(out: Path) -> Found:
    """What was measured before, on this machine with these versions."""
    if not out.exists():
        return {}
    found = dict(json.loads(out.read_text()))
    if differs := [key for key, value in settings().items() if found.get(key) != value]:
        sys.exit(f"{out} has another {differs[0]} than this run; leave --keep out to measure everything anew")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    siblings = sorted(file.parent for file in (ROOT / "siblings").glob("*/model.safetensors"))
    parser.add_argument("--work", type=Path, default=Path("build/wire"), help="a folder to work in; it is emptied")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "wire_cost.json")
    parser.add_argument("--base", type=Path, nargs="+", default=[*siblings, ROOT / "base"], help="folders of models")
    parser.add_argument("--arms", nargs="*", default=list(arms(1)), choices=list(arms(1)))
    parser.add_argument("--rounds", type=int, default=3, help="of the chain; at least 2")
    parser.add_argument("--seconds", type=float, default=300, help="for which a client is watched; 0: not at all")
    parser.add_argument("--keep", action="store_true", help="keep what --out has and is not measured now")
    arguments = parser.parse_args()
    arguments.work, bases = arguments.work.resolve(), [base.resolve() for base in arguments.base]
    if arguments.rounds < 2:
        parser.error("--rounds: a chain has at least 2")
    shutil.rmtree(arguments.work, ignore_errors=True)
    prepare(arguments.work)
    document: Found = {"benchmark": "wire_cost", **settings(), "parameters": {}, "bases": {}, "pulled": {}}
    document |= earlier(arguments.out) if arguments.keep else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for base in bases:
        document["parameters"][base.name] = parameters(base)
        found, pulls = (document[part].setdefault(base.name, {}) for part in ("bases", "pulled"))
        for name in arguments.arms:
            found[name], pulls[name] = of_arm(base, name, arms(arguments.rounds)[name], arguments.work)
            arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.seconds:
        with site(arguments.work, "by_hour", bases[-1]) as here:
            document["by_hour"] = {"base": bases[-1].name, **by_hour(here, arguments.seconds)}
    text = json.dumps(document, indent=2)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
