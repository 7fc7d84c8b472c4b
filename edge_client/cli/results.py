"""Using what was published: the commands `pull`, `evaluate`, `chat` and `serve`."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import unicodedata
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich import box as boxes
from rich.console import Console
from rich.table import Table

from converters import llama
from edge_client import outbox
from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.connection import connect
from edge_client.connection.identity import Pins
from edge_client.connection.target import ANY, Target, reaching
from edge_client.outbox import DataSource
from edge_client.results import evaluate as scores
from edge_client.results import llama_process, openai_server
from edge_client.results import pull as pulling
from edge_client.results.evaluate import Scores
from edge_client.ui.screen import Screen
from oneround.errors import BadData, Refused

app = typer.Typer()

Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
Model = Annotated[str, typer.Argument(metavar="JOB|FILE", help="A job's name, or a GGUF file.")]
Version = Annotated[int, typer.Option(help="Which one; 0: the newest.", min=0)]
VersionHere = Annotated[
    int, typer.Option(help="Of a job; 0: the newest that is here, and if none is, the newest.", min=0)
]


@app.command(epilog="Example: edge-client pull clinic-notes --artifact peft --to out/")
@reaching
def pull(
    job: Job,
    artifact: Annotated[
        str,
        typer.Option(
            help="A file or folder of the publication, or `all`. Left out: the most precise merged GGUF that fits "
            "comfortably in this machine's memory."
        ),
    ] = "",
    to: Annotated[Path | None, typer.Option(help="Where to put it.", show_default="a folder of the job's name")] = None,
    version: Version = 0,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Take a version that is not signed, as one of an earlier oneround.")
    ] = False,
    target: Target = ANY,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Fetch what was published, as its coordinator has signed it; interrupted, it goes on where it was."""
    screen = Screen(as_json)
    folder = to or Path(job)

    async def run() -> None:
        async with connect.connected(target, state, screen, job) as remote:
            made = pulling.publication(await remote.job(job), version)
            chosen = pulling.wanted(made, artifact, screen)
            await pulling.check(remote, job, made, folder, Pins(state), screen, unsigned=unsigned)
            await pulling.fetch(remote, job, chosen, folder, screen)

    asyncio.run(run())
    screen.say("folder", folder=str(folder))


@app.command(epilog="Example: edge-client evaluate clinic-notes --report")
@reaching
def evaluate(
    job: Job,
    data: Annotated[
        Path | None, typer.Option(help="A file or folder, as for join.", show_default="what was given to join")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Measure on about so many target tokens; 0: on all.", min=0)] = 20_000,
    report: Annotated[
        bool, typer.Option("--report", help="Tell the coordinator the losses, and nothing else.")
    ] = False,
    version: Version = 0,
    base_gguf: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF of the base, where its family is not known here.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    target: Target = ANY,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Did federation help here? The base, this machine's adapter and the published model, on its held-out data.

    llama.cpp measures loss and perplexity on the rows that training held out. Nothing leaves this machine without
    --report, and with it five numbers.
    """
    llama.require()
    screen = Screen(as_json)
    own = outbox.find(state, job)
    joined = own.joined()
    assert joined is not None, "find looks at joined jobs"
    if own.trained() is None:
        raise Refused(f"this machine has not trained for {job!r} yet", hint="edge-client join --data FILE_OR_FOLDER")
    source = own.source() or DataSource("data")
    if data is not None:
        source = replace(source, data=str(data))
    if not Path(source.data).exists():
        raise BadData(f"there is no data at {source.data}", hint=f"edge-client evaluate {job} --data FILE_OR_FOLDER")

    base, published, found = asyncio.run(
        pulling.to_measure(target, state, screen, joined.job, source, version, must=report)
    )
    held_out = scores.held_out(source, base, joined.job.spec.train.max_seq_len, tokens)
    kept = outbox.base_gguf(state, joined.job)
    if base_gguf is None and not kept.exists():
        screen.say("base_gguf", file=str(kept))
    whole = scores.as_gguf(base, kept, base_gguf)
    initial = own.initial if joined.job.spec.lora.freeze_a else None
    adapter = scores.own_adapter(own.adapter, base, whole, own.folder / "adapter.gguf", initial)
    files = {"base": (whole, None), "own": (whole, adapter), "published": (published, None)}
    count = sum(example.num_targets for example in held_out)
    screen.say("measuring", models=len(files), examples=len(held_out), tokens=count)
    with screen.bar("measuring", len(files) * count) as advance:
        measured = scores.measure(files, held_out, lambda model, done: advance(done, model))

    if not as_json:
        Console(highlight=False, emoji=False).print(_table(measured, published))
    screen.say("evaluated", **_described(measured, job, found, published))
    if report:
        told = measured.report(found)
        screen.say(
            "tells",
            version=told.version,
            base_loss=told.base_loss,
            own_loss=told.own_loss,
            published_loss=told.published_loss,
            tokens=told.tokens,
        )

        async def tell() -> None:
            async with connect.connected(target, state, screen, job) as remote:
                await remote.report(joined.lease, told)

        asyncio.run(tell())
        screen.say("told", job=job)


@app.command(epilog='Example: edge-client chat clinic-notes --prompt "Dear colleague,"')
@reaching
def chat(
    model: Model,
    prompt: Annotated[str, typer.Option(help="One prompt, one answer. Left out: a conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, at a temperature over 0.", min=0)] = 0,
    version: VersionHere = 0,
    target: Target = ANY,
    state: State = DEFAULT_STATE,
) -> None:
    """Talk with the published model, or with any GGUF; a model without a chat template continues your text."""
    llama.require()
    file = pulling.model_file(model, version, target, state, Screen(aside=True))
    ends_by_hand = nullcontext() if prompt else suppress(KeyboardInterrupt)
    with ends_by_hand, llama_process.Child("edge_client.results.llama_process", file) as child:
        talker = llama_process.Conversation(child, file, seed)
        if sys.stdin.isatty() and not prompt:
            does = "answers" if talker.has_chat_template else "has no chat template, and continues your text"
            print(f"{file.stem} {does}. Ctrl-D ends.", file=sys.stderr)
        history: list[dict[str, str]] = []
        while (text := prompt or _ask()) is not None:
            if not text.strip():
                continue
            if talker.has_chat_template:
                history.append({"role": "user", "content": text})
                pieces = talker.reply(history, max_tokens=max_tokens, temperature=temperature)
            else:
                print(text, end="")
                pieces = talker.complete(text, max_tokens=max_tokens, temperature=temperature)
            answer = ""
            for piece in pieces:
                answer += piece
                print(_shown(piece), end="", flush=True)
            print()
            history.append({"role": "assistant", "content": answer})
            if prompt:
                return


@app.command(epilog="Example: edge-client serve clinic-notes --port 8080")
@reaching
def serve(
    model: Model,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="Whoever reaches this address may use the model.")] = "127.0.0.1",
    version: VersionHere = 0,
    target: Target = ANY,
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Serve the published model, or any GGUF, to programs that speak OpenAI's API, on this machine."""
    openai_server.require()
    screen = Screen(as_json)
    file = pulling.model_file(model, version, target, state, screen)
    signal.signal(signal.SIGTERM, _interrupt)
    with suppress(KeyboardInterrupt), ExitStack() as open_now:  # that is how it should end
        with screen.busy("loading the model"):
            child, bound, has_template = open_now.enter_context(openai_server.served(file, host, port))
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound}/v1"
        screen.say("serving", model=file.stem, url=url, has_chat_template=has_template)
        if not as_json:
            print(_example(url, file.stem, has_template), flush=True)
        child.wait()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _example(url: str, model: str, has_template: bool) -> str:
    """A line to try it with."""
    if has_template:
        path, asks = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
        note = ""
    else:
        path, asks = "completions", '"prompt": "Hello", "max_tokens": 64'
        note = "It has no chat template: it continues texts, and does not hold conversations.\n"
    said = f'{{"model": "{model}", {asks}}}'
    return f"{note}Try it:  curl {url}/{path} -H 'Content-Type: application/json' -d '{said}'"


def _table(measured: Scores, published: Path) -> Table:
    table = Table(box=boxes.SIMPLE_HEAD)
    table.add_column("on held-out data")
    for heading in ("loss per token", "perplexity", "published − it (± 2 SE)"):
        table.add_column(heading, justify="right")
    names = {"base": "base", "own": "own adapter", "published": f"published ({published.stem})"}
    for model, name in names.items():
        loss = measured.loss(model)
        by = ""
        if model != "published":
            difference = measured.difference("published", model)
            by = f"{difference.mean:+.3f} ± {scores.CLEAR * difference.error:.3f}"
        table.add_row(name, f"{loss.per_token:.3f}", f"{loss.perplexity:.2f}", by)
    return table


def _described(measured: Scores, job: str, version: int, published: Path) -> dict[str, object]:
    """All that was found, for scripts; and the sentence, for people."""
    losses = {model: measured.loss(model) for model in scores.MODELS}
    return {
        "sentence": measured.sentence,
        "helped": measured.helped,
        "job": job,
        "version": version,
        "file": str(published),
        "tokens": losses["base"].tokens,
        "examples": len(measured.tokens),
        **{model: {"loss": loss.per_token, "perplexity": loss.perplexity} for model, loss in losses.items()},
        "published_minus": {
            other: {"loss": found.mean, "standard_error": found.error if math.isfinite(found.error) else None}
            for other in ("base", "own")
            for found in [measured.difference("published", other)]
        },
    }


def _shown(piece: str) -> str:
    """A model's words without what a terminal would obey: it may have learnt them from anybody."""
    return "".join(letter for letter in piece if letter in "\n\t" or unicodedata.category(letter) != "Cc")


def _ask() -> str | None:
    """The person's next line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
