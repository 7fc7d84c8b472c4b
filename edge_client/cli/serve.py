"""`edge-client serve`: a model for programs that speak OpenAI's API."""

from __future__ import annotations

import signal
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

from edge_client.cli.options import DEFAULT_STATE, Json, Model, State, VersionHere
from edge_client.cli.spread import spread
from edge_client.connection.target import ANY, Target
from edge_client.results import openai_server
from edge_client.results import pull as pulling
from edge_client.ui import events
from edge_client.ui.screen import Screen


@spread
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
        screen.say(events.Serving(file.stem, url, has_template))
        if not as_json:
            print(_example(url, file.stem, has_template), flush=True)
        child.wait()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _example(url: str, model: str, has_template: bool) -> str:
    """A line to try it with."""
    if has_template:
        path, request = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
        note = ""
    else:
        path, request = "completions", '"prompt": "Hello", "max_tokens": 64'
        note = "It has no chat template: it continues texts, and does not hold conversations.\n"
    body = f'{{"model": "{model}", {request}}}'
    return f"{note}Try it:  curl {url}/{path} -H 'Content-Type: application/json' -d '{body}'"
