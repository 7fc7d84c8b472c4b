"""`edge-client doctor`: what would stop this machine from taking part."""

from __future__ import annotations

import asyncio

import typer

from edge_client.cli import options
from edge_client.cli.options import DEFAULT_STATE, Json, Link, OpenJob, State, TrainingOptions
from edge_client.cli.spread import spread
from edge_client.connection.target import ANY, Target
from edge_client.doctor import run as examination
from edge_client.doctor.finding import Case
from edge_client.ui.screen import Screen


@spread
def doctor(
    link: Link = "",
    target: Target = ANY,
    job: OpenJob = "",
    training: TrainingOptions = TrainingOptions(),  # noqa: B008  frozen
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """What would stop this machine from taking part, and the way out. It joins no job and changes nothing.

    Takes what join takes. The exit code is that of the first problem, 0 if there is none.
    """
    training.pause_policy()  # what join refuses before anything else
    case = Case(
        state=state,
        target=options.invited(target, link),
        job_name=job,
        data=training.data,
        backend_name=training.backend,
        model=training.model,
        skip_bad_rows=training.skip_bad_rows,
        setup=training.setup,
    )
    raise typer.Exit(asyncio.run(examination.report(case, Screen(as_json), as_json=as_json)))
