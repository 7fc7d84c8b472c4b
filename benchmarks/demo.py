"""The whole round on one machine, with real processes: `make demo`.

One coordinator and three clients (two PyTorch, one MLX), over gRPC with TLS on 127.0.0.1. Each client's private data
is one package of Python's standard library, and none of the three was in the base model's pretraining. What comes out
is measured by llama.cpp on GGUF files: does the federated model predict everybody's held-out code better than the base,
and better than what each client could have made alone? The same recipe on everybody's pooled data is the upper mark.

Prints a table and samples; everything again in demo-output/report.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stdlib_packages as packages
from cohort import Board, Client, coordinator, run, wait_for
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from converters import adapter, architectures, llama
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from edge_client import backends, outbox
from edge_client.data import tokenize
from edge_client.results import llama_model
from oneround.errors import OneroundError

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "benchmarks" / "base"
OUT = ROOT / "demo-output"
CLIENTS = {"asyncio": "torch", "email": "torch", "xml": "mlx"}
PROMPTS = {
    "asyncio": "class Server:\n\n    async def wait_closed(self):\n",
    "email": '    def get_payload(self, i=None, decode=False):\n        """Return',
    "xml": "class ContentHandler:\n    def startElement(self, name",
}
SHOWN = "xml"  # the others' samples are in the report
SAMPLING = ("--temperature", 0.6, "--seed", 0)
TRAIN_BYTES, HELD_OUT_BYTES = 160_000, 25_000  # of source, per client
SEQUENCE = 256

JOB = """\
name = "{name}"
[model]
base = "{base}"
[lora]
rank = 16
alpha = 32
[train]
epochs = {epochs}
learning_rate = {learning_rate}
schedule = "linear"
batch_size = 8
max_seq_len = {sequence}
[round]
min_clients = {clients}
target_clients = {clients}
deadline = "1h"
[upload]
dtype = "bfloat16"
[aggregate]
method = "exact"
[publish]
gguf = ["f16", "q8_0"]
"""
EPOCHS, LEARNING_RATE = 2, 2e-3

console = Console(highlight=False, record=True, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    stages = Stages()

    with stages("data"):
        make_data()
    used = {name: usable(backend) for name, backend in CLIENTS.items()}

    with coordinator(OUT) as server:
        with stages("submit"):
            submit("stdlib", len(CLIENTS))
            submit("together", 1)

        title("Three clients train on their own data; each sends one adapter")
        with stages("federated"), Board(console) as board:
            cohort = [client(name, server, "stdlib", used[name], board, threads(len(CLIENTS))) for name in CLIENTS]
            wait_for(cohort)
            pull("stdlib", server, OUT / "published")

        title("For comparison: one model on everybody's data together")
        with stages("together"), Board(console) as board:
            wait_for([client("together", server, "together", used["asyncio"], board, threads(1))])
            pull("together", server, OUT / "together")

    title("llama.cpp measures every model on every client's held-out data")
    console.print("  on rows that no training has seen; the adapters of single clients as base + adapter")
    with stages("evaluate"):
        losses, tokens = measure()
    with stages("samples"):
        samples = {name: sample(prompt) for name, prompt in PROMPTS.items()}

    report = {
        "losses": losses,
        "held_out_tokens": tokens,
        "samples": samples,
        "clients": {
            joined.name: {"backend": joined.backend, **joined.said["receipt"], **joined.said["plan"]}
            for joined in cohort
        },
        "seconds": {**stages.seconds, "all": time.monotonic() - started},
        "published": sorted(
            file.relative_to(OUT).as_posix() for file in (OUT / "published").rglob("*") if file.is_file()
        ),
        "recipe": {"epochs": EPOCHS, "learning_rate": LEARNING_RATE, "max_seq_len": SEQUENCE},
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "claims": (kept := claims(losses)),
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2))
    console.export_text(clear=True)  # the picture begins with the result
    show(report)
    console.save_svg(str(OUT / "demo.svg"), title="make demo")
    if not all(kept.values()):
        console.print("[red]The federated model did not keep what this demo promises; see above.[/red]")
        sys.exit(1)


def make_data() -> None:
    """Each client's own rows, and all of them together."""
    for name in CLIENTS:
        packages.split(name, OUT / "data" / name, train_bytes=TRAIN_BYTES, held_out_bytes=HELD_OUT_BYTES)
    packages.pool([OUT / "data" / name for name in CLIENTS], OUT / "data" / "together")


def submit(name: str, clients: int) -> None:
    """Open a job for so many clients."""
    settings = {"base": BASE, "epochs": EPOCHS, "learning_rate": LEARNING_RATE, "sequence": SEQUENCE}
    job = OUT / f"{name}.toml"
    job.write_text(JOB.format(name=name, clients=clients, **settings))
    run("coordinator", "submit", job, "--state", OUT / "coordinator")


def usable(backend: str) -> str:
    """The backend, or torch where this machine cannot run it, said aloud."""
    reason = backends.load(backend).available()
    if reason is None:
        return backend
    console.print(f"[yellow]{backend} does not run here ({reason}); that client uses torch[/yellow]")
    return "torch"


class Stages:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def pull(job: str, server: str, to: Path) -> None:
    whole = ("--artifact", "all", "--to", to)
    run("edge-client", "pull", job, *whole, "--server", server, "--state", OUT / "clients" / "puller")


def client(name: str, server: str, job: str, backend: str, board: Board, threads: int) -> Client:
    data = OUT / "data" / name
    return Client(name, server=server, job=job, backend=backend, data=data, out=OUT, threads=threads, board=board)


def threads(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)


# Measurement


def measure() -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Loss per token of every model on every client's held-out data, and how many tokens that is."""
    base_gguf = OUT / "base.gguf"
    gguf_base.build(BASE, base_gguf)
    described = architectures.describe(BASE)
    models: dict[str, tuple[Path, Path | None]] = {"base": (base_gguf, None)}
    for name in CLIENTS:
        own = OUT / "clients" / name / "adapter.gguf"
        box_ = outbox.find(OUT / "clients" / name, "stdlib")
        gguf_adapter.write(adapter.read(box_.adapter), own, described)
        models[name] = (base_gguf, own)
    models["federated"] = (OUT / "published" / "stdlib-f16.gguf", None)
    models["federated q8_0"] = (OUT / "published" / "stdlib-q8_0.gguf", None)
    models["together"] = (OUT / "together" / "together-f16.gguf", None)

    tokenizer = tokenize.load_tokenizer(BASE)
    held_out = {
        name: tokenize.tokenise(tokenize.load(OUT / "data" / name).held_out, tokenizer, SEQUENCE).examples
        for name in CLIENTS
    }
    losses: dict[str, dict[str, float]] = {}
    tokens: dict[str, int] = {}
    columns = (TextColumn("  {task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(models) * len(held_out))
        for model, (file, lora) in models.items():
            progress.update(task, description=model)
            loaded = llama.load(file, adapter=lora, context=SEQUENCE)
            losses[model] = {}
            for name, rows in held_out.items():
                found = llama_model.evaluate(loaded, rows)
                losses[model][name], tokens[name] = found.per_token, found.tokens
                progress.advance(task)
            loaded.close()
    return losses, tokens


def claims(losses: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What the demo promises."""
    federated = losses["federated"]
    return {
        "federated beats the base on every client's data": all(federated[c] < losses["base"][c] for c in CLIENTS),
        "federated beats every client's own adapter on the others' data": all(
            federated[other] < losses[own][other] for own in CLIENTS for other in CLIENTS if own != other
        ),
    }


def sample(prompt: str) -> dict[str, str]:
    """What the base and the published model write after a prompt."""
    said = {}
    for name, file in (("base", OUT / "base.gguf"), ("published", OUT / "published" / "stdlib-q8_0.gguf")):
        said[name] = run("edge-client", "chat", file, "--prompt", prompt, "--max-tokens", 60, *SAMPLING).rstrip()
    return {"prompt": prompt, **said}


# What the person sees


def title(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def show(report: dict[str, Any]) -> None:
    losses = report["losses"]
    table = Table(box=box.SIMPLE_HEAD, title="Loss per token on held-out code, by llama.cpp (lower is better)")
    table.add_column("whose data")
    for heading in ("base", "own adapter", "the others' adapters", "federated", "federated q8_0", "all data together"):
        table.add_column(heading, justify="right")
    for name in CLIENTS:
        others = " ".join(f"{losses[other][name]:.3f}" for other in CLIENTS if other != name)
        table.add_row(
            name,
            f"{losses['base'][name]:.3f}",
            f"{losses[name][name]:.3f}",
            others,
            f"[bold green]{losses['federated'][name]:.3f}[/bold green]",
            f"{losses['federated q8_0'][name]:.3f}",
            f"{losses['together'][name]:.3f}",
        )
    console.print(table)
    for claim, holds in report["claims"].items():
        console.print(f"  {'[green]yes[/green]' if holds else '[red]no[/red]'}  {claim}")

    said = report["samples"][SHOWN]
    for name in ("base", "published"):
        console.rule(f"{name} writes", style="dim", align="left")
        console.print(said[name], markup=False)
    console.rule(style="dim")

    table = Table(box=box.SIMPLE_HEAD, title="What each client sent, once")
    for heading in ("client", "backend", "examples", "steps", "bytes"):
        table.add_column(heading, justify="left" if heading in ("client", "backend") else "right")
    for name, client in report["clients"].items():
        row = (client["examples"], client["steps"], client["size"])
        table.add_row(name, client["backend"], *(f"{count:,}" for count in row))
    console.print(table)
    seconds = ", ".join(f"{stage} {taken:.0f} s" for stage, taken in report["seconds"].items())
    console.print(f"Seconds: {seconds}")

    here = OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT
    console.print(f"\nPublished, in {here}/published/:")
    for name in report["published"]:
        console.print(f"  {name.removeprefix('published/')}")
    console.print(f"The report: {here}/report.json\n\nNext:")
    console.print(f"  .venv/bin/edge-client chat {here}/published/stdlib-q8_0.gguf", soft_wrap=True)
    console.print(f"  llama-server -m {here}/published/stdlib-q8_0.gguf", soft_wrap=True)
    console.print("  the same job across real machines: README.md")


if __name__ == "__main__":
    try:
        main()
    except OneroundError as error:
        sys.exit(f"Error: {error}" + (f"\nTry: {error.hint}" if error.hint else ""))
