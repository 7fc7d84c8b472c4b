"""`coordinator`: run the daemon, and talk to it. The commands are in the modules beside this one."""

from __future__ import annotations

import typer

from coordinator.cli import access, jobs, maintenance, serve
from oneround import command

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Announce fine-tuning jobs, take one adapter from each client, average, publish GGUFs.",
    epilog="Example: coordinator serve --job clinic-notes.toml",
    no_args_is_help=True,
)
for group in (serve.commands, jobs.commands, maintenance.commands):
    app.add_typer(group)
app.add_typer(access.token, name="token")
app.add_typer(access.clients, name="clients")


def main() -> None:
    """The console script."""
    command.run(app, "coordinator")


if __name__ == "__main__":
    main()
