"""`edge-client chat`: talk with a model."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Annotated

import typer

from converters import llama
from edge_client.cli.options import DEFAULT_STATE, Model, State, VersionHere
from edge_client.cli.spread import spread
from edge_client.connection.target import ANY, Target
from edge_client.results import llama_process
from edge_client.results import pull as pulling
from edge_client.results.llama_process import Conversation
from edge_client.ui.screen import Screen


@spread
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
        conversation = llama_process.Conversation(child, file, seed)
        if sys.stdin.isatty() and not prompt:
            does = "answers" if conversation.has_chat_template else "has no chat template, and continues your text"
            print(f"{file.stem} {does}. Ctrl-D ends.", file=sys.stderr)
        _converse(conversation, [prompt] if prompt else _typed(), max_tokens, temperature)


def _converse(
    conversation: Conversation, prompts: list[str] | Iterator[str], max_tokens: int, temperature: float
) -> None:
    """Print what the model says to each prompt, as it comes."""
    history: list[dict[str, str]] = []
    for prompt in prompts:
        if conversation.has_chat_template:
            history.append({"role": "user", "content": prompt})
            pieces = conversation.reply(history, max_tokens=max_tokens, temperature=temperature)
        else:
            print(prompt, end="")
            pieces = conversation.complete(prompt, max_tokens=max_tokens, temperature=temperature)
        answer = ""
        for piece in pieces:
            answer += piece
            print(_printable(piece), end="", flush=True)
        print()
        history.append({"role": "assistant", "content": answer})


def _typed() -> Iterator[str]:
    """The person's lines, without empty ones, until the end of input."""
    with suppress(EOFError):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                yield line


def _printable(piece: str) -> str:
    """A model's words without what a terminal would obey: it may have learnt them from anybody."""
    return "".join(letter for letter in piece if letter in "\n\t" or unicodedata.category(letter) != "Cc")
