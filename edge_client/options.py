"""Options that several commands take, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import platformdirs
import typer

DEFAULT_STATE = Path(platformdirs.user_data_dir("oneround")) / "client"
State = Annotated[Path, typer.Option("--state", help="Where jobs are kept.", show_default="the user's data folder")]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        help="The coordinator's HOST:PORT. Left out: the last one joined, or the one on this network.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON, for scripts.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS; for a coordinator on this machine.")]
