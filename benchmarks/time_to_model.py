"""How long a model takes, in one round and in many, under stated devices and links: a simulation with measured inputs.

    python benchmarks/time_to_model.py        # half a minute

Measured are bytes on the wire, seconds of a step and of a publication; where each comes from stands in `inputs`.
Assumed is how people's machines differ and sleep: PROFILES, with a reason for each figure. The simulation is
simulated.py.

Every plan has the same cohort of ten and the same steps for each client in all: T rounds have STEPS / T each.
`one device` is centralised training: everybody's data on one median device that never sleeps, so ten times the steps;
what it would take to bring the data there is not counted. The time is that to the last publication, from submitting
on a working day. The base model is on every client's disk. There are no weekends: all days are alike.

Writes one JSON document to --out, and prints it last; `table` makes Markdown of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from round_costs import Found, Model, demo_model, large_model, measured_in_peace
from simulated import DAY, HOUR, KINDS, Hours, Link, Plan, Profile, Timeline, simulate

RESULTS = Path(__file__).parent / "results"
CLIENTS = 10  # as in the paper that the benchmark is about, arXiv 2412.04650
STEPS = 300  # of each client in all: three epochs of 800 examples in batches of 8
ROUNDS = (1, 2, 3, 5, 10)

PROFILES = {
    # People's own laptops, at home and at work.
    "laptops": Profile(
        link=Link(
            up=20,  # a cable or VDSL line's usual upload
            down=100,  # and its download
            round_trip=0.03,  # to a server in the same country
            shared=1000,  # a rented server's port
            breaks_per_hour=1,  # Wi-Fi, trains, a lid: while transferring
            break_seconds=5,  # the client tries again after 1, 2 and 4 s
        ),
        hours=Hours(
            opens=9,  # with the working day, one hour sooner or later
            closes=18,
            jitter=1,
            open_stretch=2,  # then a meeting, a commute, a meal
            nap=0.5,
            days_off=0.1,  # half a day a week out of the office, or at another machine
        ),
        spread=0.35,  # two of three within a factor of 1.4: five years of laptops in one cohort
        stragglers=0.1,  # on battery, hot, or busy with something else
        slowdown=4,
    ),
    # One room: machines of one kind that are shut at night.
    "one LAN": Profile(
        link=Link(up=1000, down=1000, round_trip=0.001, shared=1000),  # gigabit Ethernet, the coordinator's too
        hours=Hours(opens=9, closes=18, jitter=0.5),
        spread=0.1,  # bench_train.py saw a machine's own speed change by more
    ),
    # The same devices as to their median speed, in one rack: nothing sleeps.
    "datacenter": Profile(
        link=Link(up=100_000, down=100_000, round_trip=0.0002, shared=100_000),
        spread=0.05,
    ),
}

# When a round closes. The deadline is long: stragglers are waited for, or left behind by the target.
CLOSING: dict[str, dict[str, Any]] = {
    "all ten": {"target": CLIENTS, "quorum": 2, "deadline": 7 * DAY},
    "eight of ten": {"target": 8, "quorum": 2, "deadline": 7 * DAY},
    "half, and a day": {"target": CLIENTS, "quorum": 5, "deadline": DAY},
}
SHOWN = ("all ten", "eight of ten")  # in the table; what clients' hours go into is of the first


# ---- runs ----


def plan(model: Model, rounds: int, closing: Mapping[str, Any]) -> Plan:
    """So many rounds, with STEPS steps of each client in all."""
    down = (model.first_down_bytes + (rounds - 1) * model.further_down_bytes) / rounds
    each = (STEPS // rounds, model.step_seconds, model.up_bytes, down, model.publish_seconds)
    return Plan(rounds, *each, clients=CLIENTS, **closing)


def summary(runs: list[Timeline], planned: Plan, by_hour: Found) -> Found:
    """Over seeds: hours to the model, what a client spends them with, and its bytes, heartbeats and all."""
    done = [run for run in runs if run.has_model]
    if not done:
        return {"with_model": 0.0}
    hours = sorted(run.seconds / HOUR for run in done)
    p10, p90 = (float(np.quantile(hours, share)) for share in (0.1, 0.9))
    contributions = [each.contributions for run in done for each in run.rounds]
    spent = {kind: statistics.mean(run.spent[kind] for run in done) / HOUR for kind in KINDS}
    bytes_by_way = {
        target: planned.rounds * size
        + spent["computing"] * by_hour["training"][target]
        + (spent["waiting"] + spent["publishing"]) * by_hour["waiting"][target]
        for target, size in (("up", planned.up_bytes), ("down", planned.down_bytes))
    }
    return {
        "hours": {"median": statistics.median(hours), "p10": p10, "p90": p90},
        "spent_hours": spent,
        "bytes": bytes_by_way,
        "contributions": statistics.mean(contributions),
        "with_model": len(done) / len(runs),
    }


def one_device(model: Model) -> float:
    """Hours of centralised training: every client's steps on one device that is always awake, and a publication."""
    return (CLIENTS * STEPS * model.step_seconds + model.publish_seconds) / HOUR


def run(models: Mapping[str, Model], by_hour: Found, seeds: int) -> Found:
    """Every model, profile, way of closing and number of rounds; `by_hour` is wire_cost.json's."""

    def runs(profile: Profile, planned: Plan) -> Found:
        return summary([simulate(profile, planned, seed) for seed in range(seeds)], planned, by_hour)

    results: Found = {}
    for name, model in models.items():
        results[name] = {"one device": one_device(model), "profiles": {}}
        for profile, devices in PROFILES.items():
            results[name]["profiles"][profile] = {
                closing: {str(rounds): runs(devices, plan(model, rounds, rule)) for rounds in ROUNDS}
                for closing, rule in CLOSING.items()
            }
    document: Found = {
        "benchmark": "time_to_model",
        "seeds": seeds,
        "clients": CLIENTS,
        "steps": STEPS,
        "inputs": {name: asdict(model) for name, model in models.items()},
        "profiles": {name: asdict(profile) for name, profile in PROFILES.items()},
        "closing": CLOSING,
        "results": results,
    }
    return {key: rounded(value) for key, value in document.items()}


def rounded(found: Any) -> Any:
    """Floats to five significant digits; what JSON has no number for as a word."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, float):
        return float(f"{found:.5g}") if math.isfinite(found) else "never"
    return found


# ---- what is shown ----


def table(document: Found) -> str:
    """Markdown: time to model by model, profile and rule, and what a client's hours go into."""
    heads = " | ".join("one round" if rounds == 1 else f"T = {rounds}" for rounds in ROUNDS)
    lines = [f"| | closes with | one device | {heads} |", "|---|---|" + "---:|" * (1 + len(ROUNDS))]
    parts = ["| one round; T = 10 | " + " | ".join(KINDS) + " |", "|---|" + "---:|" * len(KINDS)]
    for name, found in document["results"].items():
        alone = time(found["one device"])
        for profile, closings in found["profiles"].items():
            for closing in SHOWN:
                cells = " | ".join(cell(closings[closing][str(rounds)]) for rounds in ROUNDS)
                lines.append(f"| {name}, {profile} | {closing} | {alone} | {cells} |")
            once, often = (closings[SHOWN[0]][str(rounds)]["spent_hours"] for rounds in (ROUNDS[0], ROUNDS[-1]))
            spent = " | ".join(f"{time(once[kind])}; {time(often[kind])}" for kind in KINDS)
            parts.append(f"| {name}, {profile} | {spent} |")
    return "\n".join([*lines, "", *parts]) + "\n"


def cell(found: Found) -> str:
    """Median (10th to 90th percentile) of the runs that came to a model."""
    if not found["with_model"]:
        return "never"
    hours = found["hours"]
    share = "" if found["with_model"] == 1 else f", {found['with_model']:.0%} of runs"
    return f"{time(hours['median'])} ({time(hours['p10'])}–{time(hours['p90'])}{share})"


def time(hours: float) -> str:
    """As people say it: seconds, minutes, hours or days."""
    seconds = hours * HOUR
    if seconds < 100:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wire", type=Path, default=RESULTS / "wire_cost.json", help="what wire_cost.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "time_to_model.json")
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--table", action="store_true", help="print the table instead")
    arguments = parser.parse_args()
    wire, publish, train = (
        json.loads(file.read_text()) for file in (arguments.wire, RESULTS / "publish.json", RESULTS / "train.json")
    )
    models = {"1.1B": large_model(wire, publish, train)}
    if measured_in_peace(wire):
        models = {"5M": demo_model(wire), **models}
    else:
        print(
            "5M is left out: its seconds were measured while the machine had other work; see wire_cost.py --keep",
            file=sys.stderr,
        )
    document = run(models, wire["by_hour"], arguments.seeds)
    text = json.dumps(document, indent=2)
    arguments.out.write_text(text + "\n")
    print(table(document) if arguments.table else text)


if __name__ == "__main__":
    main()
