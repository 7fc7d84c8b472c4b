"""How fast training is on one machine, beside TRL's SFTTrainer with PEFT and beside mlx-lm's own trainer.

A Llama of 28 million parameters (random weights: time does not depend on them) is fine-tuned with LoRA of all its
linear layers on GSM8K and on a part of Dolly. All train the same examples, and learn the same tokens: the answers.

- torch, mlx: `edge_client.backends`, each as it runs by itself; torch in float32 as well.
- trl: SFTTrainer with its defaults (checkpointing, bfloat16 by autocast). First it runs once with every setting that
  could be faster; the two fastest take part in all repeats, and `torch_over_trl_best` is over the best of them.
- mlx-lm: `mlx_lm.tuner.trainer.train`, not checkpointing, in our precision, with our BLAS.

Each run is a process of its own and makes two passes. Only the second is timed: from the end of the first one's last
step to the end of its own, by the wall clock, batches and reports included. By then every framework has imported,
loaded, compiled and allocated. Contestants take turns, so that a slow minute of the machine slows them all; figures are
medians. All wait with sleeping OpenMP threads, as training here does. A token counts when it is learnt: prompts and
padding do not. Peak memory is the process's largest resident set over both passes; `growth_mb` is what that is above
the process after its imports.

That it computes the same: losses of the first 20 steps beside those of the plainest loop there is (PEFT, float32, all
logits, an attention mask), from the same adapter over the same batches, as `max_loss_difference`.

    python benchmarks/bench_train.py --work build/bench --json build/bench/train.json   # an hour; --quick: half of it

`--cuda` takes a model of 1B's shape to a GPU, and adds `mfu`, the share of --peak-tflops (dense) that the model needs:

    FLOPs = (4·P + 6·A)·tokens + 4·V·D·targets

with P weights in the blocks' linear layers (frozen: forward, and backward to what came in), A the adapter's, V·D the
output layer, which only targets need; tokens without padding. Attention's own products are left out.

The data is what lies beside the repository in ../shared/data. Prints one JSON document last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

from train_inputs import SHAPES, SHARED, Found, Task
from trainers import NAIVE_STEPS, TRL

DATASETS = ["gsm8k", "dolly"]
QUICK = ["trl:grouped", "trl:bfloat16-base-grouped"]  # among the fastest; without --quick, found out
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "mlx", "mlx-lm", "numpy")
TOLERANCE = 0.01  # that contestants may differ by in what they learn


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- runs ----


def child(task: Task, name: str, *more: object) -> Found:
    """What a contestant found; {"failed": why} if it did not get there."""
    log = task.work / f"{name.replace(':', '-')}-{task.data}.log"
    fields = json.dumps(asdict(task), default=str)
    command = [sys.executable, str(Path(__file__).with_name("trainers.py")), name, fields, *map(str, more)]
    environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    with log.open("w") as complaints:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment)
    if done.returncode:
        last = log.read_text("utf-8", "replace").strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        say(f"{task.data:8} {name:26} failed: {last[0]} (all it said is in {log})")
        return {"failed": last[0]}
    return dict(json.loads(done.stdout))


def trained(task: Task, name: str) -> Found:
    """A timed run, with what follows from it."""
    found = child(task, name)
    if "failed" in found:
        return found
    found["target_tokens_per_second"] = round(found["targets"] / found["seconds"], 1)
    found["growth_mb"] = round(found["peak_mb"] - found["imported_mb"], 1)
    found |= {key: round(found[key], 3) for key in ("seconds", "cpu_seconds")}
    found["losses"] = [round(loss, 5) for loss in found["losses"]]
    last = f", last loss {found['losses'][-1]:.3f}" if found["losses"] else ""  # TRL tells none before step 10
    say(
        f"{task.data:8} {name:26} {found['target_tokens_per_second']:9.1f} target tokens/s, "
        f"{found['seconds']:7.2f} s, peak {found['peak_mb']:7.1f} MB{last}"
    )
    return found


def needed(found: Found, name: str) -> Found:
    if "failed" in found:
        sys.exit(f"without {name} there is nothing to compare")
    return found


def fastest(candidates: dict[str, Found], count: int) -> list[str]:
    able = {name: found["target_tokens_per_second"] for name, found in candidates.items() if "failed" not in found}
    return sorted(able, key=able.__getitem__, reverse=True)[:count]


# ---- figures ----


def summary(runs: list[Found]) -> Found:
    """Medians with the spread; losses and settings are the first run's."""
    spread = ("target_tokens_per_second", "seconds", "cpu_seconds", "peak_mb", "growth_mb", "peak_gpu_mb", "mfu")
    found: Found = {
        key: {
            "median": statistics.median(run[key] for run in runs),
            "min": min(run[key] for run in runs),
            "max": max(run[key] for run in runs),
        }
        for key in spread
        if key in runs[0]
    }
    kept = ("targets", "tokens", "steps", "precision", "settings", "steps_per_loss", "losses")
    return found | {key: runs[0][key] for key in kept if key in runs[0]}


def ratios(of: dict[str, Found]) -> Found:
    """Over the contestants of one dataset."""
    speed = {name: found["target_tokens_per_second"]["median"] for name, found in of.items()}
    best = max((name for name in speed if name in TRL), key=speed.__getitem__)
    found: Found = {
        "torch_over_trl": round(speed["torch"] / speed["trl"], 2),
        "torch_over_trl_best": round(speed["torch"] / speed[best], 2),
        "trl_best": best,
    }
    return found | ({"mlx_over_mlx_lm": round(speed["mlx"] / speed["mlx-lm"], 2)} if "mlx" in speed else {})


def differences(of: dict[str, Found], naive: Found) -> Found:
    """The largest difference of a step's loss from the naive loop's."""
    return {
        name: round(max(abs(a - b) for a, b in zip(of[name]["losses"], naive["losses"], strict=False)), 6)
        for name in ("torch", "torch-float32", "mlx")
        if name in of
    }


def flops(shape: dict[str, int], rank: int, tokens: int, targets: int) -> float:
    """Of one pass: see above."""
    hidden, inner, size = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    layers = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layers += [(hidden, inner), (hidden, inner), (inner, hidden)]
    linear = shape["num_hidden_layers"] * sum(into * out for into, out in layers)
    adapter = shape["num_hidden_layers"] * rank * sum(into + out for into, out in layers)
    return float((4 * linear + 6 * adapter) * tokens + 4 * shape["vocab_size"] * hidden * targets)


def machine(inputs: Found) -> Found:
    flags, model = set(), platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in lines}
        flags, model = set(known.get("flags", "").split()), known.get("model name", model)
    elif sys.platform == "darwin":
        model = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch_threads": inputs["threads"],
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "gpu": inputs.get("gpu"),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")):
            found[package] = metadata.version(package)
    return found


# ---- all of it ----


def tried_once(tasks: dict[str, Task], arguments: argparse.Namespace) -> dict[str, dict[str, Found]]:
    """Every setting of TRL on each data set; none with --quick."""
    candidates: dict[str, dict[str, Found]] = {data: {} for data in DATASETS}
    names = [name for name in TRL if name != "trl:compiled" or arguments.with_compile]
    for name in names if not arguments.quick else ():
        for data in DATASETS:
            candidates[data][name] = trained(tasks[data], name)
    return candidates


def repeated(
    tasks: dict[str, Task], names: dict[str, list[str]], inputs: Found, arguments: argparse.Namespace
) -> dict[str, dict[str, list[Found]]]:
    """Every contestant's runs on each data set, in turns. Ends where one learns another number of tokens."""
    runs: dict[str, dict[str, list[Found]]] = {data: {name: [] for name in names[data]} for data in DATASETS}
    for _ in range(arguments.repeats):
        for data, task in tasks.items():
            for name in names[data]:
                one = needed(trained(task, name), name)
                learnt = inputs["datasets"][data]["targets"]
                if abs(one["targets"] / learnt - 1) > TOLERANCE:
                    sys.exit(f"{name} learns {one['targets']} tokens of {data}, and not {learnt}: nothing to compare")
                if arguments.cuda:
                    work = flops(SHAPES[task.shape], task.rank, one["tokens"], one["targets"])
                    one["mfu"] = round(work / one["seconds"] / arguments.peak_tflops / 1e12, 4)
                runs[data][name].append(one)
    return runs


def run(arguments: argparse.Namespace) -> Found:
    task = Task(
        work=arguments.work,
        shape="1b" if arguments.cuda else "28m",
        data="inputs",
        batch_size=arguments.batch_size,
        max_seq_len=arguments.max_seq_len,
        rank=16,
        alpha=32.0,
        learning_rate=3e-4,
    )
    task.work.mkdir(parents=True, exist_ok=True)
    inputs = needed(child(task, "inputs", json.dumps(DATASETS), arguments.examples), "the inputs")
    found_on = machine(inputs)
    with_mlx = importlib.util.find_spec("mlx_lm") is not None and not arguments.cuda
    always = ["torch", *([] if arguments.cuda else ["torch-float32"]), *(["mlx", "mlx-lm"] if with_mlx else []), "trl"]
    tasks = {data: replace(task, data=data) for data in DATASETS}

    candidates = tried_once(tasks, arguments)
    names = {
        data: always
        + (QUICK if arguments.quick else fastest({**candidates[data], "trl": {"failed": "always there"}}, 2))
        for data in DATASETS
    }

    runs = repeated(tasks, names, inputs, arguments)
    contestants = {data: {name: summary(found) for name, found in of.items()} for data, of in runs.items()}
    table = {data: ratios(of) for data, of in contestants.items()}
    smallest = {
        key: min((row[key] for row in table.values() if key in row), default=None)
        for key in ("torch_over_trl", "torch_over_trl_best", "mlx_over_mlx_lm")
    }
    agreement: Found = {}
    if not arguments.cuda:
        for data in DATASETS:
            say(f"{data:8} the naive loop, {NAIVE_STEPS} steps")
            agreement[data] = differences(contestants[data], needed(child(tasks[data], "naive"), "the naive loop"))
    return {
        "benchmark": "train",
        **smallest,
        "by_dataset": table,
        "max_loss_difference": {
            name: max(of[name] for of in agreement.values()) for name in next(iter(agreement.values()), {})
        },
        "max_loss_difference_by_dataset": agreement,
        "settings": {
            **{key: value for key, value in asdict(task).items() if key not in ("work", "data")},
            "base": SHAPES[task.shape],
            "base_stored_in": "bfloat16",
            "schedule": "linear",
            "target_modules": "all-linear",
            "repeats": arguments.repeats,
            **({"peak_tflops": arguments.peak_tflops} if arguments.cuda else {}),
        },
        "datasets": inputs["datasets"],
        "contestants": contestants,
        "trl_candidates_once": candidates,
        "machine": found_on,
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="a folder for models and logs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=320, help="of each dataset; a multiple of the batch size")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument(
        "--quick", action="store_true", help="TRL's defaults and the two settings known to be fast only"
    )
    parser.add_argument("--with-compile", action="store_true", help="also TRL with torch_compile, which starts slowly")
    parser.add_argument("--cuda", action="store_true", help="a model of 1B's shape on a GPU")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, dense bfloat16 (default: H200)")
    parser.add_argument("--json", "--out", type=Path, help="also write the document there")
    arguments = parser.parse_args()
    if arguments.examples % arguments.batch_size:
        parser.error("mlx-lm drops a last short batch: --examples must be a multiple of --batch-size")
    if not SHARED.is_dir():
        print(f"the datasets are not there: {SHARED} must hold gsm8k and dolly15k_fed10", file=sys.stderr)
        sys.exit(2)
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: pip install -c constraints.txt -e '.[bench]'", file=sys.stderr)
        sys.exit(2)
    arguments.work = (arguments.work / "train").resolve()
    document = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(run(arguments), indent=2))
    if arguments.json:
        arguments.json.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
