"""How many clients one daemon carries, how fast one contribution gets in and out, and what never waits for what.

Everything runs against `coordinator serve` as it is, in a process of its own, with TLS, over loopback:

- crowd: simulated clients in several processes, each with a TCP connection of its own, join, beat every two seconds,
  and all begin to send at the same moment. Lost is whoever's digest the daemon does not show in the end. Memory is the
  daemon's largest resident set, above what it was after one client had joined and sent; again with a tenth of the
  clients, and with adapters four times the size: both must make no difference.
- upload, download: one large file, from the client's disk to the receipt, and from the daemon to the client's disk,
  synced and digest-checked. Beside each repeat, what bounds it: a bare gRPC stream of the same messages and TLS between
  two processes, where nobody keeps anything; and writing as many bytes to the same disk, synced.
- publishing: heartbeats while the daemon publishes a 1.1B model, quantised and verified, beside those of an idle one.

Clients share the processors with the daemon, so latencies are upper bounds; `client_lag_p99_ms` says how late the
simulation's own timers fired, `used_by_others` what share of the processors went to work that is not this benchmark's.

    python benchmarks/bench_coordinator.py --work build/bench --json build/bench/coordinator.json   # 20 GB, 15 minutes

Prints one JSON document last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path

import crowd
import psutil
import transfers
from crowd import Plan, Sendable, Tally
from served import JOB, ROOT, Daemon, Found, Memory, Others, daemon, fetched, joined, judged, make_base, rank_for, say

from coordinator.cli import client as control
from edge_client.connection.channel import Connection as ClientConnection
from edge_client.connection.remote import Remote
from oneround.v1 import federation_pb2 as pb

BEAT_SECONDS = 2.0  # as edge_client does
SPAWN = multiprocessing.get_context("spawn")  # gRPC does not survive a fork


# ---- a crowd ----


def run_crowd(arguments: argparse.Namespace) -> Found:
    """The crowd; a tenth of it; and all of it with four times the adapter."""
    clients, size = arguments.clients, arguments.adapter_mb
    whole = one_crowd(arguments, clients, size)
    flat = [one_crowd(arguments, max(1, clients // 10), size), whole, one_crowd(arguments, clients, 4 * size)]
    shown = ("clients", "adapter_mb", "lost", "growth_mb", "growth_when_joined_mb", "children_peak_mb")
    return {**whole, "flat": [{key: run[key] for key in shown} for run in flat]}


def one_crowd(arguments: argparse.Namespace, clients: int, megabytes: float) -> Found:
    base, work = ROOT / "base", arguments.work / "crowd"
    job = {
        "model": {"base": str(base)},
        "lora": {"rank": rank_for(base, megabytes, "bfloat16"), "target_modules": ["all-linear"]},
        "round": {"min_clients": clients + 1, "target_clients": 0, "deadline": "24h", "max_clients": clients + 1},
        "upload": {"dtype": "bfloat16", "quota": "200GB"},
    }
    say(f"crowd of {clients}, {megabytes} MB each")
    with daemon(work / "state", job) as running:
        sendables = asyncio.run(_warm_up(running, clients, work))
        memory, others = Memory(running.pid), Others()
        tally, phases = _together(arguments, running, sendables, memory)
        phases["used_by_others"] = others.share()
        shown, judging = asyncio.run(_all_judged(running))
        found = {
            "clients": clients,
            "adapter_mb": round(sendables[0].size / 1e6, 2),
            "lost": _lost(shown, sendables),
            "receipts": tally.receipts,
            **_verdicts(shown),
            **_figures(tally, phases, sendables[0].size),
            "seconds_until_all_judged": judging,
            **phases,
            **memory.stop(),
        }
    shutil.rmtree(work)
    say(json.dumps(found))
    return found


async def _warm_up(running: Daemon, clients: int, work: Path) -> list[Sendable]:
    """Everybody's adapter; and one client more has joined and sent, so that idle memory has seen everything once."""
    async with running.remote(clients) as remote:
        reply = await joined(remote, clients)
        initial = await fetched(remote, reply.job, work / "initial.safetensors")
        sendables = crowd.write_adapters(reply.job, initial, work / "adapters", range(clients + 1))
        last = sendables.pop()
        await remote.upload(reply.lease, last.declaration, last.file, lambda _: None)
        await judged(remote, reply.lease)
        return sendables


def _together(
    arguments: argparse.Namespace, running: Daemon, sendables: list[Sendable], memory: Memory
) -> tuple[Tally, Found]:
    """All processes of clients from their start to the last receipt."""
    together = SPAWN.Barrier(arguments.processes + 1)
    reports: list[Connection] = []
    workers = []
    for nth in range(arguments.processes):
        mine = {number: sendables[number] for number in range(nth, len(sendables), arguments.processes)}
        plan = Plan(
            running.address,
            running.certificate,
            JOB,
            mine,
            arguments.join_seconds,
            arguments.send_seconds,
            BEAT_SECONDS,
        )
        report, theirs = SPAWN.Pipe(duplex=False)
        workers.append(SPAWN.Process(target=crowd.process, args=(plan, together, theirs), daemon=True))
        workers[-1].start()
        theirs.close()
        reports.append(report)
    started, used = time.monotonic(), running.cpu_seconds()
    together.wait(crowd.PATIENCE)
    sending, growth, used_joining = time.monotonic(), memory.now() - memory.idle, running.cpu_seconds() - used
    together.wait(crowd.PATIENCE)
    phases = {
        "began_sending": sending,
        "seconds_joining": round(sending - started, 2),
        "seconds_sending": round(time.monotonic() - sending, 2),
        "daemon_cpu_seconds_joining": round(used_joining, 2),
        "daemon_cpu_seconds_sending": round(running.cpu_seconds() - used - used_joining, 2),
        "growth_when_joined_mb": round(growth, 1),
    }
    tally = Tally()
    for report, worker in zip(reports, workers, strict=True):
        tally.add(report.recv())
        worker.join()
    return tally, phases


def _figures(tally: Tally, phases: Found, size: int) -> Found:
    sending = phases.pop("began_sending")
    wall = phases["seconds_sending"]
    return {
        **latencies("heartbeat", [ms for _, ms in tally.beats]),
        "heartbeat_p99_ms_joining": percentile([ms for at, ms in tally.beats if at < sending], 0.99),
        "heartbeat_p99_ms_sending": percentile([ms for at, ms in tally.beats if at >= sending], 0.99),
        **latencies("join", tally.joins),
        "client_lag_p99_ms": percentile(tally.lags, 0.99),
        "uploads_open_at_once": most_at_once(tally.streams),
        "uploads_per_second": round(tally.receipts / wall, 1),
        "mb_per_second": round(tally.receipts * size / 1e6 / wall, 1),
        "retried": dict(tally.retried),
        "failed": tally.failed[:10],
    }


async def _all_judged(running: Daemon) -> tuple[pb.JobStatus, float]:
    """What the daemon shows once it has looked at everything, and how long after the last receipt that was."""
    started = time.monotonic()
    while True:
        shown = await control.show(running.state, JOB)
        seconds = round(time.monotonic() - started, 1)
        if not _verdicts(shown)["pending"] or seconds > crowd.PATIENCE:
            return shown, seconds
        await asyncio.sleep(1.0)


def _lost(shown: pb.JobStatus, sendables: list[Sendable]) -> int:
    there = {client.name: client.contribution.declaration.digest for client in shown.clients}
    return sum(there.get(crowd.client_name(number)) != sent.digest for number, sent in enumerate(sendables))


def _verdicts(shown: pb.JobStatus) -> Found:
    """How many contributions stand where; the warm-up's is among them."""
    verdicts = [client.contribution.judgement.verdict for client in shown.clients if client.HasField("contribution")]
    names = {name: getattr(pb, f"VERDICT_{name.upper()}") for name in ("admitted", "clipped", "quarantined")}
    counted = {name: verdicts.count(value) for name, value in names.items()}
    return {**counted, "pending": len(verdicts) - sum(counted.values())}


# ---- heartbeats while a model is published ----


def run_publishing(arguments: argparse.Namespace) -> Found:
    base, work = make_base(arguments.work / "base"), arguments.work / "publishing"
    job = {
        "model": {"base": str(base)},
        "lora": {"rank": 16, "target_modules": ["all-linear"]},
        "round": {"min_clients": 3, "target_clients": 3, "deadline": "24h"},
        "upload": {"dtype": "bfloat16"},
        "publish": {"gguf": ["bf16", "q8_0", "q4_k_m"]},
    }
    with daemon(work / "state", job) as running:
        found = asyncio.run(_publishing(running, work))
    shutil.rmtree(work)
    say(json.dumps(found))
    return found


async def _publishing(running: Daemon, work: Path) -> Found:
    """Ten clients beat ten times a second: first for nothing else, then while what three of them sent is published."""
    tally = Tally()
    async with running.remote(0) as remote:
        first = await joined(remote, 0)
        initial = await fetched(remote, first.job, work / "initial.safetensors")
        sendables = crowd.write_adapters(first.job, initial, work / "adapters", range(3))
        channels = [crowd.channel(running.address, running.certificate) for _ in range(10)]
        remotes = [
            Remote(ClientConnection(running.address, channel, running.certificate), crowd.me(number))
            for number, channel in enumerate(channels)
        ]
        leases = [(await joined(each, number)).lease for number, each in enumerate(remotes)]
        pulses = [asyncio.create_task(crowd.lag(tally.lags))]
        for each, lease in zip(remotes, leases, strict=True):
            pulses.append(asyncio.create_task(crowd.beat(each, lease, 0.1, tally)))
        await asyncio.sleep(15)
        idle = [ms for _, ms in tally.beats]
        memory, others, used = Memory(running.pid), Others(), running.cpu_seconds()
        for each, lease, sent in zip(remotes, leases, sendables, strict=False):
            await each.upload(lease, sent.declaration, sent.file, lambda _: None)
        stages, state, reason = await _stages(remote)
        used, elsewhere = running.cpu_seconds() - used, others.share()
        for heartbeat in pulses:
            heartbeat.cancel()
        await asyncio.gather(*pulses, return_exceptions=True)
        for channel in channels:
            await channel.close()
    began, ended = stages[0][0], stages[-1][0]
    during = [ms for at, ms in tally.beats if began <= at <= ended]
    return {
        **latencies("heartbeat", during),
        "heartbeats": len(during),
        "heartbeat_p99_ms_idle": percentile(idle, 0.99),
        "client_lag_p99_ms": percentile(tally.lags, 0.99),
        "seconds": round(ended - began, 1),
        "daemon_cpu_seconds": round(used, 2),
        "used_by_others": elsewhere,
        "by_stage": _by_stage(stages, tally.beats),
        "state": state,
        "reason": reason,
        "retried": dict(tally.retried),
        **memory.stop(),
    }


async def _stages(remote: Remote) -> tuple[list[tuple[float, str]], str, str]:
    """When each stage began, the end last; and where the job stands then."""
    seen: list[tuple[float, str]] = []
    async for status in remote.watch(JOB):
        now = time.monotonic()
        if status.state == pb.STATE_PUBLISHING and (not seen or seen[-1][1] != status.stage):
            seen.append((now, status.stage))
        if status.state in (pb.STATE_PUBLISHED, pb.STATE_FAILED):
            return [*seen, (now, "end")], pb.State.Name(status.state), status.reason
    sys.exit("the daemon stopped telling")


def _by_stage(stages: list[tuple[float, str]], beats: list[tuple[float, float]]) -> list[Found]:
    found = []
    for (began, name), (ended, _) in itertools.pairwise(stages):
        during = [ms for at, ms in beats if began <= at < ended]
        found.append({"stage": name, "seconds": round(ended - began, 1), "p99_ms": percentile(during, 0.99)})
    return found


# ---- figures ----


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return round(ordered[math.ceil(share * len(ordered)) - 1], 2) if ordered else None


def latencies(name: str, values: Sequence[float]) -> Found:
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{name}_{key}_ms": percentile(values, share) for key, share in shares.items()}


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """How many spans overlapped at most."""
    events = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def machine() -> Found:
    packages = ("grpcio", "protobuf", "sqlalchemy", "numpy")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


SECTIONS = ("crowd", "upload", "download", "publishing")


def run(arguments: argparse.Namespace) -> Found:
    found: Found = {"benchmark": "coordinator", "machine": machine()}
    wanted = arguments.only.split(",")
    if "crowd" in wanted:
        found["crowd"] = whole = run_crowd(arguments)
        found |= {key: whole[key] for key in ("clients", "lost", "heartbeat_p99_ms", "join_p99_ms")}
        found["peak_rss_growth_mb"] = whole["growth_mb"]
    if {"upload", "download"} & set(wanted):
        for name, one in transfers.run(arguments, wanted).items():
            found |= {name: one, f"{name}_share_of_limit": one["share_of_limit"]}
    if "publishing" in wanted:
        found["publishing"] = run_publishing(arguments)
        found["heartbeat_p99_ms_while_publishing"] = found["publishing"]["heartbeat_p99_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="a folder for some 20 GB")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--adapter-mb", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=4, help="processes that the crowd is spread over")
    parser.add_argument("--join-seconds", type=float, default=15.0, help="the time within which the crowd arrives")
    parser.add_argument("--send-seconds", type=float, default=5.0, help="the time within which it begins to send")
    parser.add_argument("--upload-mb", type=float, default=512.0)
    parser.add_argument("--repeats", type=int, default=5, help="of upload and download")
    parser.add_argument("--json", type=Path, help="also write the document there")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(SECTIONS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; --only takes {', '.join(SECTIONS)}")
    arguments.work = arguments.work.resolve()
    document = json.dumps(run(arguments), indent=2)
    if arguments.json:
        arguments.json.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
