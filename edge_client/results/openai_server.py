"""A model behind llama-cpp-python's OpenAI-compatible server, in a process of its own.

The model is loaded as for `chat`, and not by the server: it would take weights repacked, which crashes on some
processors, and keep the logits of every position. The server's own app lets any web page that is open in a browser talk
to the model; this one does not, and on loopback it takes no request that was meant for another host.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import llama
from edge_client.results import llama_model, llama_process
from oneround.errors import OneroundError, UsageError

if TYPE_CHECKING:
    from llama_cpp import Llama

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def require() -> None:
    """Raises UsageError, with what to install, when llama.cpp or its server is not here."""
    llama.require()
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "sse_starlette")):
        raise UsageError("llama.cpp's server is not installed here", hint="pip install 'oneround[serve]'")


@contextmanager
def served(model: Path, host: str, port: int) -> Iterator[tuple[llama_process.Child, int, bool]]:
    """Serve a GGUF until the block ends; gives the process, the port and whether the model has a chat template.

    Raises:
        UsageError: the address cannot be bound.
        BadModel: llama.cpp does not take the file.
    """
    with llama_process.Child("edge_client.results.openai_server", model) as child:
        (ready,) = child.ask(model=str(model), host=host, port=port)
        yield child, ready["port"], ready["has_chat_template"]


# ---- in the child ----


class SingleModel:
    """One model, in the place of the server's own keeper of several."""

    def __init__(self, name: str, model: Llama) -> None:
        self._name = name
        self._model = model

    def __call__(self, name: str | None = None) -> Llama:
        return self._model

    def __iter__(self) -> Iterator[str]:
        return iter([self._name])


def application(model: Llama, name: str, host: str) -> Any:
    """The server's routes around one model."""
    from fastapi import FastAPI
    from llama_cpp.server import app as server
    from llama_cpp.server.settings import ServerSettings
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Its settings would else be read from the environment. Nobody's answer is cut off by another one's question.
    server.set_server_settings(ServerSettings(host=host, api_key=None, interrupt_requests=False, root_path=""))
    server._llama_proxy = SingleModel(name, model)
    app = FastAPI(title=name)
    app.include_router(server.router)
    if host in LOOPBACK:  # a page whose name was made to mean this machine still says its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return app


def serve(request: llama_process.Reply, tell: Callable[[llama_process.Reply], None]) -> None:
    """Load, listen, say so, and serve until standard input ends."""
    import uvicorn

    file, host = Path(request["model"]), request["host"]
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, request["port"]), family=family)
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UsageError(
            f"cannot listen on {host}:{request['port']}: {why}", hint="--port 0 takes a free one"
        ) from error
    loaded = llama.load_to_talk(file)
    app = application(loaded, file.stem, host)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))

    def end_with_input() -> None:
        sys.stdin.read()
        os._exit(0)  # whoever asked for it is gone, and nothing here is worth keeping

    threading.Thread(target=end_with_input, daemon=True).start()
    tell({"port": listening.getsockname()[1], "has_chat_template": llama_model.has_chat_template(loaded)})
    tell({"end": True})
    server.run(sockets=[listening])


if __name__ == "__main__":
    tell = llama_process.teller()
    try:
        serve(json.loads(sys.stdin.readline()), tell)
    except OneroundError as error:
        tell(llama_process.failure(error))
