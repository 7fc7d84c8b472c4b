"""`edge-client evaluate`: did federation help here?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from converters import llama
from edge_client.cli.options import DEFAULT_STATE, Job, Json, State, Version
from edge_client.cli.spread import spread
from edge_client.connection import connect
from edge_client.connection.target import ANY, Target
from edge_client.results import evaluate as evaluation
from edge_client.results import pull as pulling
from edge_client.results.scores import CLEAR, Scores
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.v1 import federation_pb2 as pb


@spread
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
    own = evaluation.own_training(state, job, data)
    base, published, number = asyncio.run(
        pulling.to_measure(target, state, screen, own.job, own.source, version, must=report)
    )
    scores = evaluation.compare(own, base, published, screen, tokens=tokens, state=state, base_gguf=base_gguf)
    if not as_json:
        Console(highlight=False, emoji=False).print(_table(scores, published))
    screen.say(evaluation.event(scores, job, number, published))
    if report:
        asyncio.run(_report(target, state, screen, own, scores.report(number)))


async def _report(
    target: Target, state: Path, screen: Screen, own: evaluation.OwnTraining, losses: pb.Evaluation
) -> None:
    """Tell the coordinator five numbers, and the person which."""
    screen.say(
        events.LossesReported(
            version=losses.version,
            base_loss=losses.base_loss,
            own_loss=losses.own_loss,
            published_loss=losses.published_loss,
            tokens=losses.tokens,
        )
    )
    job = own.job.spec.name
    async with connect.connected(target, state, screen, job) as remote:
        await remote.report(own.lease, losses)
    screen.say(events.ReportReceived(job))


def _table(scores: Scores, published: Path) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("on held-out data")
    for heading in ("loss per token", "perplexity", "published − it (± 2 SE)"):
        table.add_column(heading, justify="right")
    names = {"base": "base", "own": "own adapter", "published": f"published ({published.stem})"}
    for model, name in names.items():
        loss = scores.loss(model)
        margin = ""
        if model != "published":
            difference = scores.difference("published", model)
            margin = f"{difference.mean:+.3f} ± {CLEAR * difference.error:.3f}"
        table.add_row(name, f"{loss.per_token:.3f}", f"{loss.perplexity:.2f}", margin)
    return table
