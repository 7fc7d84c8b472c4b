"""What all commands of the operator share: where the daemon is, and how things are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console

# Without a terminal lines are as long as they need to be: a log or a pipe has no edge to wrap at.
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)

DEFAULT_STATE = Path(platformdirs.user_data_dir("oneround")) / "coordinator"
State = Annotated[Path, typer.Option("--state", help="The daemon's folder.", show_default="the user's data folder")]
Database = Annotated[str, typer.Option("--database", help="SQLAlchemy URL; SQLite in the state folder if empty.")]
BlobsUrl = Annotated[str, typer.Option("--blobs", help="fsspec URL for contributions; the state folder if empty.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]
Why = Annotated[str, typer.Option("--why", help="For the record; goes into the manifest.")]


def print_json(message: Message, **more: Any) -> None:
    """One document: a message, and what else there is to say."""
    table = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    print(json.dumps(table | more, indent=2))
