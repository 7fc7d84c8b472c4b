"""`edge-client status`: the jobs of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from edge_client import outbox
from edge_client.cli.options import DEFAULT_STATE, Json, State
from edge_client.outbox import Outbox
from edge_client.ui import rows
from edge_client.ui.rows import JoinedJob


def status(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """The jobs that this machine has joined, and how far each is."""
    jobs = [_row(job) for job in outbox.all_outboxes(state)]
    if as_json:
        rows.print_list(jobs)
    else:
        _show(jobs)


def _row(job: Outbox) -> JoinedJob:
    joined, trained, receipt = job.joined(), job.trained(), job.receipt()
    assert joined is not None, "all_outboxes lists joined jobs"
    return JoinedJob(
        job=joined.job.spec.name,
        server=job.server(),
        stage="contributed" if receipt else "trained, not sent" if trained else "joined, not trained",
        examples=trained.num_examples if trained else None,
        bytes=receipt.size if receipt else None,
        folder=str(job.folder),
    )


def _show(jobs: Sequence[JoinedJob]) -> None:
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if not jobs:
        out.print("No job joined yet. Start with:  edge-client join --server HOST:PORT --data FILE_OR_FOLDER")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("job", "server", "stage", "examples", "sent"):
        table.add_column(heading)
    for row in jobs:
        sent = f"{row.bytes:,} bytes" if row.bytes else ""
        table.add_row(row.job, row.server, row.stage, str(row.examples or ""), sent)
    out.print(table)
