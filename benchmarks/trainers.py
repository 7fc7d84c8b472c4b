"""What bench_train.py compares: each contestant trains in a process of its own, and times the second of its two passes.

A contestant is a function Task → Found with `seconds` and `cpu_seconds` of the second pass, `targets` learnt in it,
`tokens` seen in it (prompts count, padding does not), `losses` of both passes, each the mean of `steps_per_loss` steps,
`imported_mb` (resident after imports), and for others' trainers what they were set to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from train_inputs import PASSES, Found, Task, make_inputs, prepared

if TYPE_CHECKING:
    from edge_client.data.batches import Batches

NAIVE_STEPS = 20
# What could make TRL faster than its defaults, which are gradient checkpointing and bfloat16 by autocast.
_PLAIN = {"gradient_checkpointing": False}
_GROUPED = {**_PLAIN, "train_sampling_strategy": "group_by_length"}
TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl:plain": _PLAIN,
    "trl:grouped": _GROUPED,
    "trl:bfloat16-base": {**_PLAIN, "model_init_kwargs": {"dtype": "bfloat16"}},
    "trl:bfloat16-base-grouped": {**_GROUPED, "model_init_kwargs": {"dtype": "bfloat16"}},
    "trl:float32-grouped": {**_GROUPED, "bf16": False},
    "trl:packed": {**_PLAIN, "packing": True},
    "trl:compiled": {**_GROUPED, "torch_compile": True},
}


class Watch:
    """Times the second pass: from the end of the first one's last step to the end of its own."""

    def __init__(self, steps: int, synchronise: Callable[[], None]) -> None:
        """`steps` of one pass; `synchronise` waits for whatever still computes."""
        self._steps = steps
        self._synchronise = synchronise
        self._marks: list[tuple[float, float]] = []

    def after(self, step: int) -> None:
        """A step is done, counted from 1."""
        if step in (self._steps, PASSES * self._steps):
            self._synchronise()
            self._marks.append((time.perf_counter(), time.process_time()))

    def found(self) -> Found:
        (began, used), (ended, used_up) = self._marks
        return {"seconds": ended - began, "cpu_seconds": used_up - used, "steps": self._steps}


# ---- contestants ----


def ours(task: Task, name: str, precision: str) -> Found:
    from edge_client import backends
    from edge_client.backends import Progress, Setup

    backend = backends.load(name)
    imported = resident_mb()
    plan, initial, recipe = prepared(task)
    watch = Watch(plan.steps_per_epoch, _synchronise(name))
    losses: list[float] = []

    def on_step(progress: Progress) -> None:
        losses.append(progress.loss)
        watch.after(progress.step)

    setup = Setup(precision=precision or backend.precision())
    backend.train(task.base, initial, recipe, plan, on_step, setup=setup)
    found = {"imported_mb": imported, "losses": losses, "steps_per_loss": 1, "precision": setup.precision}
    return {**watch.found(), **_counted(plan), **found}


def trl(task: Task, options: dict[str, Any]) -> Found:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    imported = resident_mb()

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.after(state.global_step)

    settings = {
        "per_device_train_batch_size": task.batch_size,
        "max_length": task.max_seq_len,
        "learning_rate": task.learning_rate,
        "num_train_epochs": PASSES,
        "use_cpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    trainer = SFTTrainer(
        model=str(task.base),
        args=SFTConfig(output_dir=str(task.work / "trl"), **settings),
        train_dataset=Dataset.from_list([json.loads(line) for line in (task.rows / "train.jsonl").open()]),
        peft_config=LoraConfig(
            r=task.rank, lora_alpha=task.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    watch = Watch(len(trainer.get_train_dataloader()), _synchronise("torch"))
    trainer.add_callback(Marks())
    trainer.train()
    rows = list(trainer.train_dataset)
    return {
        **watch.found(),
        "imported_mb": imported,
        "targets": sum(label != -100 for row in rows for label in row["labels"][1:]),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "losses": [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "steps_per_loss": 10,  # its default
        "settings": settings,
    }


def mlx_lm(task: Task) -> Found:
    """mlx-lm's trainer, its defaults but for what the task says, on our token ids. It clips no gradients, and also
    learns the token of padding after each shorter example; that is not counted."""
    from edge_client import backends

    backends.load("mlx")  # puts a fast BLAS in front of MLX's own, for mlx-lm as well
    import mlx.core as mx
    from mlx.optimizers import Adam, linear_schedule
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    imported = resident_mb()
    plan, _, _ = prepared(task)
    watch = Watch(plan.steps_per_epoch, _synchronise("mlx"))
    losses: list[float] = []
    rows = [([int(i) for i in example.ids], int(example.is_target.argmax())) for example in plan.examples]

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for step, batch in enumerate(iterate_batches(*args, **kwargs)):
            if step < plan.total_steps:  # the next is asked for when the one before is done; the last tells by report
                watch.after(step)
            yield batch

    class Reports(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            losses.append(train_info["train_loss"])
            if train_info["iteration"] == plan.total_steps:
                watch.after(plan.total_steps)

    model, _ = load_model(task.base)
    gpu = mx.default_device() == mx.Device(mx.gpu)
    model.set_dtype(mx.bfloat16 if gpu else mx.float32)  # on a CPU MLX is many times slower in bfloat16
    model.freeze()
    mx.random.seed(0)
    lora = {"rank": task.rank, "scale": task.alpha / task.rank, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), lora)
    settings = {
        "batch_size": task.batch_size,
        "iters": plan.total_steps,
        "max_seq_length": task.max_seq_len,
        "steps_per_report": 10,
        "steps_per_save": plan.total_steps + 1,
    }
    train(
        model,
        Adam(linear_schedule(task.learning_rate, 0.0, plan.total_steps), bias_correction=True),  # as all the others
        rows,
        args=TrainingArgs(**settings, adapter_file=str(task.work / "mlx-lm.safetensors")),
        iterate_batches=batches,
        training_callback=Reports(),
    )
    precision = "bfloat16" if gpu else "float32"
    found = {"imported_mb": imported, "losses": losses, "steps_per_loss": 10, "precision": precision}
    return {**watch.found(), **_counted(plan), **found, "settings": settings}


def naive(task: Task) -> Found:
    """What the fast loops must agree with: PEFT and transformers in float32, all logits, an attention mask."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    plan, initial, recipe = prepared(task)
    names = list(initial.modules)
    config = LoraConfig(r=task.rank, lora_alpha=task.alpha, target_modules=names)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32), config)
    for name, factors in initial.modules.items():
        layer = model.get_base_model().get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.tensor(factors.a))
            layer.lora_B["default"].weight.copy_(torch.tensor(factors.b / recipe.scaling(task.rank)))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    losses = []
    for step in range(min(NAIVE_STEPS, plan.total_steps)):
        batch = plan.batch(step)
        inputs, labels, mask = (
            torch.from_numpy(array) for array in (batch.inputs, batch.labels.astype(int), batch.mask)
        )
        attended = mask.flip(1).cummax(1).values.flip(1).long()  # every example ends with a target
        logits = model(input_ids=inputs, attention_mask=attended, use_cache=False).logits
        loss = cross_entropy(logits[mask], labels[mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return {"losses": losses}


def _counted(plan: Batches) -> Found:
    tokens = sum(len(example.ids) for example in plan.examples)
    return {"targets": plan.num_targets, "tokens": tokens}


def resident_mb() -> float:
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def _synchronise(backend: str) -> Callable[[], None]:
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.synchronize
    return lambda: None


CONTESTANTS: dict[str, Callable[[Task], Found]] = {
    "torch": lambda task: ours(task, "torch", ""),
    "torch-float32": lambda task: ours(task, "torch", "float32"),
    "mlx": lambda task: ours(task, "mlx", ""),
    "mlx-lm": mlx_lm,
    "naive": naive,
} | {name: lambda task, options=options: trl(task, options) for name, options in TRL.items()}


def peak() -> Found:
    """This process's largest resident set, and what it allocated on a GPU at most."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB here
    found = {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return found


def main() -> None:
    """`python trainers.py NAME TASK`, both JSON where they are not a word: one JSON document on stdout, all else on
    stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # frameworks and their dashboards print to stdout
    name, given, *more = sys.argv[1:]
    fields = json.loads(given)
    task = Task(**{**fields, "work": Path(fields["work"])})
    if name == "inputs":
        found = make_inputs(task, json.loads(more[0]), int(more[1]))
    else:
        found = {**CONTESTANTS[name](task), **peak()}
    print(json.dumps(found), file=answer, flush=True)


if __name__ == "__main__":
    main()
