"""`edge-client`: take part in a job, and use what comes of it. Each command is a module of its name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from edge_client.cli import receipts
from edge_client.cli.chat import chat
from edge_client.cli.discover import discover
from edge_client.cli.doctor import doctor
from edge_client.cli.evaluate import evaluate
from edge_client.cli.join import join
from edge_client.cli.leave import leave
from edge_client.cli.pull import pull
from edge_client.cli.serve import serve
from edge_client.cli.service import install_service, uninstall_service
from edge_client.cli.status import status
from edge_client.cli.stay import stay
from edge_client.cli.trust import trust
from oneround import command

COMMANDS: dict[Callable[..., None], str] = {  # with the arguments of an example, in the order of `--help`
    join: "--server host:50051 --data notes/",
    discover: "",
    trust: "host:50051 FINGERPRINT",
    doctor: "--server host:50051 --data notes/",
    status: "",
    leave: "clinic-notes",
    stay: "--server host:50051 --accept 'clinic-*' --data notes/",
    install_service: "--server host:50051 --accept 'clinic-*' --data notes/",
    uninstall_service: "",
    pull: "clinic-notes --artifact peft --to out/",
    evaluate: "clinic-notes --report",
    chat: 'clinic-notes --prompt "Dear colleague,"',
    serve: "clinic-notes --port 8080",
}

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Fine-tune a shared model on files that stay on this machine; send one adapter; use the result.",
    epilog="Example: edge-client join --server host:50051 --data notes/",
    no_args_is_help=True,
)
for function, arguments in COMMANDS.items():
    name = function.__name__.replace("_", "-")
    app.command(name, epilog=f"Example: edge-client {name} {arguments}".rstrip())(function)
app.add_typer(
    receipts.app,
    name="receipt",
    help="What proves that a contribution is safe, and whether a publication has it.",
    epilog="Example: edge-client receipt verify clinic-notes --manifest clinic-notes/manifest.json",
)


def main() -> None:
    """The console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"  # whatever a base's files name: all that a client fetches is the coordinator's
    try:
        command.run(app, "edge-client")
    except SystemExit as end:
        if "mlx.core" in sys.modules and isinstance(end.code, int):
            # What MLX keeps for the training thread is freed while Python ends, which can abort the process, receipt or
            # not (ml-explore/mlx#4110). Nothing of ours is left to be done here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


if __name__ == "__main__":
    main()
