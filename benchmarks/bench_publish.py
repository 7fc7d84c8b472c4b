"""How fast contributions become one merged GGUF, and in how much memory, beside the usual path in the same run.

The base has TinyLlama-1.1B's shape in bfloat16 (random weights: time does not depend on them) and every client gives a
rank-16 adapter of all linear layers in float32. Both sides start from files on disk and end with one bfloat16 GGUF:

- usual: PEFT loads base and adapters, add_weighted_adapter(cat), merge_and_unload, save_pretrained; then llama.cpp's
  convert_hf_to_gguf.py. It does not sync what it writes.
- ours: aggregate and merge into the base GGUF, synced to the disk before it counts as done.

Verification, quantised types, growth with the number of clients, and the machine's own limits are measured beside it.
Each step runs in a process of its own; peak memory is that process's largest resident set, mapped pages included.

    python benchmarks/bench_publish.py --work /tmp/bench        # needs 25 GB there, and some ten minutes

Prints one JSON document last. `speedup` is the usual path's seconds over ours, `memory_ratio` our peak over theirs.
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
import time
from collections.abc import Callable
from pathlib import Path

import llama_source

ROOT = Path(__file__).parent
RANK, CLIENTS = 16, 10
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


# ---- what is worked on ----


def make_inputs(work: Path) -> None:
    """Base, adapters as PEFT folders and as contributions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from converters import adapter, architectures, peft
    from converters.adapter import Adapter, LowRank

    if (work / "ready").exists():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype=torch.bfloat16)).to(torch.bfloat16)
    model.save_pretrained(work / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "base" / name, work / "base" / name)
    shapes = architectures.describe(work / "base").linears
    for n in range(CLIENTS):
        start = adapter.initial(shapes, RANK, seed=0)
        rng = torch.Generator().manual_seed(n)
        update = {
            name: LowRank(factors.a, torch.randn(factors.b.shape, generator=rng).mul_(0.01).numpy())
            for name, factors in start.modules.items()
        }
        adapter.write(Adapter(update), work / f"client-{n}.safetensors")
        peft.write(Adapter(update), work / f"client-{n}", base_model=str(work / "base"))
    (work / "ready").touch()


# ---- steps, each in a process of its own ----


def usual_merge(work: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
    names = [f"c{n}" for n in range(CLIENTS)]
    model = PeftModel.from_pretrained(model, work / "client-0", adapter_name=names[0])
    for n, name in enumerate(names[1:], 1):
        model.load_adapter(work / f"client-{n}", adapter_name=name)
    model.add_weighted_adapter(names, [1 / CLIENTS] * CLIENTS, "mean", combination_type="cat")
    model.set_adapter("mean")
    model.merge_and_unload(adapter_names=["mean"]).save_pretrained(work / "usual")
    AutoTokenizer.from_pretrained(work / "base").save_pretrained(work / "usual")


def usual_convert(work: Path) -> None:
    llama_source.convert(llama_source.folder(), [("gpt-2", work / "usual", work / "usual.gguf", "bf16")])


def build_base(work: Path) -> None:
    from converters.gguf import base as gguf_base

    gguf_base.build(work / "base", work / "base.gguf")


def merge(work: Path, clients: int = CLIENTS) -> None:
    from converters import adapter, architectures
    from converters.gguf import merge as gguf_merge
    from coordinator import aggregate
    from coordinator.aggregate import ClientUpdate

    files = [work / f"client-{n % CLIENTS}.safetensors" for n in range(clients)]
    mean = aggregate.aggregate([ClientUpdate(adapter.read(file), 100) for file in files], "exact").adapter
    base = architectures.describe(work / "base")
    gguf_merge.merge(work / "base.gguf", mean, work / "merged.gguf", "bf16", base)


def write_adapter(work: Path) -> None:
    from converters import adapter, architectures
    from converters.gguf import adapter as gguf_adapter
    from coordinator import aggregate
    from coordinator.aggregate import ClientUpdate

    files = [work / f"client-{n}.safetensors" for n in range(CLIENTS)]
    mean = aggregate.aggregate([ClientUpdate(adapter.read(file), 100) for file in files], "exact").adapter
    gguf_adapter.write(mean, work / "adapter.gguf", architectures.describe(work / "base"))


def verify(work: Path) -> dict[str, float]:
    from coordinator.publication import verify

    against = verify.base_and_adapter(work / "base.gguf", work / "adapter.gguf")
    verdict = verify.verdict(verify.alone(work / "merged.gguf", "bf16", against.ids), against)
    return {"relative_logit_difference": verdict.value, "top1_agreement": verdict.top1_agreement}


def quantise(work: Path, kind: str) -> None:
    from converters.gguf import quantize as gguf_quantize

    gguf_quantize.quantize(work / "merged.gguf", work / f"{kind}.gguf", kind)


def copy(work: Path) -> None:
    """The least that any path has to do: read a model of this size and put another on the disk."""
    with (work / "base.gguf").open("rb") as source, (work / "copy.gguf").open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        os.fsync(target.fileno())


def start(work: Path) -> None:
    """Importing what a merge imports."""
    import converters.gguf.merge  # noqa: F401
    import coordinator.aggregate  # noqa: F401


def matmul(work: Path) -> dict[str, float]:
    """What the products alone would take: all cores, float32, at the shape of the widest one."""
    import numpy as np

    from converters import architectures

    b, a = np.ones((5632, RANK * CLIENTS), np.float32), np.ones((RANK * CLIENTS, 2048), np.float32)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        b @ a
        best = max(best, 2 * b.size * a.shape[1] / (time.perf_counter() - started) / 1e9)
    weights = sum(out * into for out, into in architectures.describe(work / "base").linears.values())
    gflop = 2 * weights * RANK * CLIENTS / 1e9
    return {"gflop": round(gflop), "gflops": round(best), "seconds": round(gflop / best, 2)}


def agreement(work: Path) -> dict[str, float]:
    """How the two paths' weights differ: the usual one rounds each product to bfloat16, ours rounds the sum once."""
    import numpy as np

    from converters.gguf import file as gguf_file

    usual, ours = gguf_file.read(work / "usual.gguf").tensors, gguf_file.read(work / "merged.gguf").tensors
    assert usual.keys() == ours.keys()
    equal = whole = largest = 0.0
    for name, tensor in ours.items():
        left, right = gguf_file.to_float32(tensor), gguf_file.to_float32(usual[name])
        equal, whole = equal + float((left == right).sum()), whole + left.size
        largest = max(largest, float(np.abs(left - right).max() / np.abs(right).max()))
    return {"equal_weights": round(equal / whole, 4), "largest_relative_difference": round(largest, 5)}


STEPS: dict[str, Callable[..., dict[str, float] | None]] = {
    step.__name__: step
    for step in (
        make_inputs,
        usual_merge,
        usual_convert,
        build_base,
        merge,
        write_adapter,
        verify,
        quantise,
        copy,
        start,
        agreement,
        matmul,
    )
}


# ---- measuring ----


def measured(work: Path, step: str, *more: object) -> dict[str, float]:
    """Seconds and peak resident MB of a step, imports and process start included."""
    command = [sys.executable, __file__, "--work", str(work), "--step", step, *(str(value) for value in more)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None, "asked for above"
    lines = child.stdout.read().splitlines() or [b"{}"]
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{step} failed")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB here
    result = {
        "seconds": round(seconds, 2),
        "peak_mb": round(usage.ru_maxrss * unit / 1e6, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        **json.loads(lines[-1]),
    }
    print(f"{' '.join([step, *map(str, more)]):24} {result}", file=sys.stderr, flush=True)
    return result


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def run(work: Path, repeats: int, clients: list[int]) -> dict[str, object]:
    work.mkdir(parents=True, exist_ok=True)
    measured(work, "make_inputs")
    built, usual, convert, ours, copies = [], [], [], [], []
    for _ in range(repeats):  # interleaved, so that a slow minute of the machine slows both
        usual.append(measured(work, "usual_merge"))
        convert.append(measured(work, "usual_convert"))
        built.append(measured(work, "build_base"))
        ours.append(measured(work, "merge"))
        copies.append(measured(work, "copy"))
    first, second, base, merged, copied = (median(runs) for runs in (usual, convert, built, ours, copies))
    difference = measured(work, "agreement")
    usual_seconds = round(first["seconds"] + second["seconds"], 2)
    usual_peak = max(first["peak_mb"], second["peak_mb"])
    measured(work, "write_adapter")
    after = {"verify": measured(work, "verify")} | {
        kind: measured(work, "quantise", kind) for kind in ("q8_0", "q4_k_m")
    }
    growth = {n: measured(work, "merge", n) for n in clients}

    return {
        "benchmark": "publish",
        "base": "TinyLlama-1.1B shape, bfloat16, random",
        "clients": CLIENTS,
        "rank": RANK,
        "repeats": repeats,
        "speedup": round(usual_seconds / merged["seconds"], 2),
        "speedup_with_base_build": round(usual_seconds / (merged["seconds"] + base["seconds"]), 2),
        "memory_ratio": round(merged["peak_mb"] / usual_peak, 4),
        "usual": {"merge": first, "convert": second, "seconds": usual_seconds, "peak_mb": usual_peak},
        "ours": merged,
        "build_base_once": base,
        "agreement": {key: difference[key] for key in ("equal_weights", "largest_relative_difference")},
        "afterwards": after,
        "by_clients": growth,
        "limits": {
            "start_and_imports": measured(work, "start"),
            "matmul": measured(work, "matmul"),
            "copy_and_sync": copied,
        },
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for 25 GB of models; kept, and used again")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 50, 100, 200])
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, *more = arguments.step
        found = STEPS[name](arguments.work, *(int(value) if value.isdecimal() else value for value in more))
        print(json.dumps(found or {}))
        return
    print(json.dumps(run(arguments.work, arguments.repeats, arguments.clients), indent=2))


if __name__ == "__main__":
    main()
