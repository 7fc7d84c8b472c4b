"""The whole round on one machine, with real processes: `make demo`.

One coordinator and three clients (two PyTorch, one MLX), over gRPC with TLS on 127.0.0.1. Each client's private data
is one package of Python's standard library, and none of the three was in the base model's pretraining. What comes out
is measured by llama.cpp on GGUF files: does the federated model predict everybody's held-out code better than the base,
and better than what each client could have made alone? The same recipe on everybody's pooled data is the upper mark.

Prints a table and samples; everything again in demo-output/report.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from converters import adapter, architectures, gguf_adapter, gguf_base, llama
from converters.errors import OneroundError
from edge_client import backends, examples, local_model, outbox
from edge_client.screen import columns_of_a_bar

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "benchmarks" / "base"
OUT = ROOT / "demo-output"
CLIENTS = {"asyncio": "torch", "email": "torch", "xml": "mlx"}
PROMPTS = {
    "asyncio": "class Server:\n\n    async def wait_closed(self):\n",
    "email": '    def get_payload(self, i=None, decode=False):\n        """Return',
    "xml": "class ContentHandler:\n    def startElement(self, name",
}
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
        for name in CLIENTS:
            split_package(name, OUT / "data" / name)
        pool([OUT / "data" / name for name in CLIENTS], OUT / "data" / "together")
    used = {name: usable(backend) for name, backend in CLIENTS.items()}

    with coordinator() as server:
        with stages("submit"):
            for name, clients in (("stdlib", len(CLIENTS)), ("together", 1)):
                job = OUT / f"{name}.toml"
                job.write_text(
                    JOB.format(
                        name=name,
                        base=BASE,
                        epochs=EPOCHS,
                        learning_rate=LEARNING_RATE,
                        sequence=SEQUENCE,
                        clients=clients,
                    )
                )
                run("coordinator", "submit", job, "--state", OUT / "coordinator")

        title("Three clients train on their own data; each sends one adapter")
        with stages("federated"), Board() as board:
            cohort = [Client(name, server, "stdlib", used[name], OUT / "data" / name, board) for name in CLIENTS]
            wait_for(cohort)
            pull("stdlib", server, OUT / "published")

        title("For comparison: one model on everybody's data together")
        with stages("together"), Board() as board:
            wait_for([Client("together", server, "together", used["asyncio"], OUT / "data" / "together", board)])
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
            client.name: {"backend": client.backend, **client.said["receipt"], **client.said["plan"]}
            for client in cohort
        },
        "seconds": {**stages.seconds, "all": time.monotonic() - started},
        "published": sorted(
            file.relative_to(OUT).as_posix() for file in (OUT / "published").rglob("*") if file.is_file()
        ),
        "recipe": {"epochs": EPOCHS, "learning_rate": LEARNING_RATE, "max_seq_len": SEQUENCE},
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "claims": claims(losses),
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2))
    console.export_text(clear=True)  # the picture begins with the result
    show(report)
    console.save_svg(str(OUT / "demo.svg"), title="make demo")
    if not all(report["claims"].values()):
        console.print("[red]The federated model did not keep what this demo promises; see above.[/red]")
        sys.exit(1)


# Data


def split_package(package: str, folder: Path) -> None:
    """A package's source as train.jsonl and valid.jsonl, whole files in each; the same on every run."""
    source = Path(sysconfig.get_paths()["stdlib"]) / package
    files = sorted(file for file in source.rglob("*.py") if file.stat().st_size > 500)
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(source).as_posix().encode()).digest())
    train: list[str] = []
    valid: list[str] = []
    for file in files:
        text = file.read_text("utf-8")
        if sum(map(len, valid)) + len(text) <= HELD_OUT_BYTES:
            valid.append(text)
        elif sum(map(len, train)) + len(text) <= TRAIN_BYTES:
            train.append(text)
    folder.mkdir(parents=True)
    for name, texts in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def pool(folders: list[Path], to: Path) -> None:
    """Everybody's data in one folder."""
    to.mkdir(parents=True)
    for name in ("train.jsonl", "valid.jsonl"):
        (to / name).write_text("".join((folder / name).read_text() for folder in folders))


# Processes


def usable(backend: str) -> str:
    """The backend, or torch where this machine cannot run it, said aloud."""
    reason = backends.load(backend).available()
    if reason is None:
        return backend
    console.print(f"[yellow]{backend} does not run here ({reason}); that client uses torch[/yellow]")
    return "torch"


@contextmanager
def coordinator() -> Iterator[str]:
    """A daemon on a free port of 127.0.0.1; gives its address, and stops it in the end."""
    log = (OUT / "coordinator.log").open("w")
    command = [tool("coordinator"), "serve", "--listen", "127.0.0.1:0", "--state", str(OUT / "coordinator")]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    announced = OUT / "coordinator" / "daemon.json"
    try:
        while not announced.exists():
            if process.poll() is not None:
                sys.exit(f"the coordinator did not start; see {log.name}")
            time.sleep(0.05)
        yield json.loads(announced.read_text())["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


class Client:
    """One `edge-client join`, its progress on the board, and what it said last of each kind."""

    def __init__(self, name: str, server: str, job: str, backend: str, data: Path, board: Board) -> None:
        self.name, self.backend = name, backend
        self.said: dict[str, dict[str, Any]] = {}
        self.log = OUT / f"client-{name}.log"
        self._board = board
        self._row = board.add(f"{name} ({backend})")
        alone = job == "together"
        command = [tool("edge-client"), "join", "--server", server, "--job", job, "--data", str(data), "--name", name]
        command += ["--backend", backend, "--state", str(OUT / "clients" / name), "--json", "--wait"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            # Three trainings share this machine; threads that spin while they wait would take it from each other.
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads(1 if alone else len(CLIENTS))),
                "OMP_WAIT_POLICY": "passive",
            },
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None, "asked for above"
        for line in self.process.stdout:
            said = json.loads(line)
            self.said[said["event"]] = said
            if said["event"] == "progress":
                detail = f"loss {said['loss']:.3f}" if "loss" in said else ""
                self._board.update(self._row, said["what"], said["done"], said["total"], detail)
            elif said["event"] == "receipt":
                self._board.update(self._row, "receipt", 1, 1, f"{said['size']:,} bytes sent")
            elif said["event"] == "waiting" and said["state"] == "publishing":
                self._board.update(self._row, "publishing", 1, 1, "the coordinator merges and verifies")
            elif said["event"] == "published":
                self._board.update(self._row, "done", 1, 1, f"v{said['version']} is there")


def wait_for(clients: list[Client]) -> None:
    """Until all have seen the publication; if one fails, the others have nothing to wait for."""
    pending = list(clients)
    try:
        while pending:
            for client in tuple(pending):
                code = client.process.poll()
                if code:
                    sys.exit(f"client {client.name} failed:\n{client.log.read_text()}")
                if code == 0:
                    client.reader.join()
                    pending.remove(client)
            time.sleep(0.1)
    finally:
        for client in clients:
            if client.process.poll() is None:
                client.process.terminate()


class Board:
    """Progress bars in a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        columns = (
            TextColumn("  {task.description:<18}"),
            TextColumn("{task.fields[what]:<10}"),
            *columns_of_a_bar(),
        )
        self._progress = Progress(*columns, console=console) if console.is_terminal else None
        self._names: list[str] = []
        self._printed: dict[int, tuple[float, str]] = {}

    def __enter__(self) -> Board:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def add(self, name: str) -> int:
        self._names.append(name)
        if self._progress:
            return self._progress.add_task(name, what="starting", detail="", total=None)
        return len(self._names) - 1

    def update(self, row: int, what: str, done: int, total: int, detail: str) -> None:
        if self._progress:
            self._progress.update(TaskID(row), what=what, completed=done, total=total, detail=detail)
            return
        last, last_what = self._printed.get(row, (0.0, ""))
        if what != last_what or time.monotonic() - last > 10:
            self._printed[row] = (time.monotonic(), what)
            console.print(f"  {self._names[row]:<18} {what:<10} {done}/{total} {detail}")


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
    run(
        "edge-client",
        "pull",
        job,
        "--artifact",
        "all",
        "--to",
        to,
        "--server",
        server,
        "--state",
        OUT / "clients" / "puller",
    )


def run(name: str, *arguments: object) -> str:
    """Run one of our commands; its output, or the end of the demo with what it said."""
    done = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} {' '.join(map(str, arguments))} failed with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


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

    tokenizer = examples.load_tokenizer(BASE)
    held_out = {
        name: examples.tokenise(examples.load(OUT / "data" / name).held_out, tokenizer, SEQUENCE).examples
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
                found = local_model.evaluate(loaded, rows)
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

    for said in report["samples"].values():
        for name in ("base", "published"):
            console.rule(name, style="dim", align="left")
            console.print(said[name], markup=False)

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
