"""What a row can be, and the JSON object of each kind → a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edge_client.data.files import SKIP
from oneround.errors import BadData

ChatMessage = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A text to be learnt as it stands. `where` is its file and line, for messages to the person."""

    where: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose assistant turns, from message `learn_from` on, are to be learnt."""

    where: str
    messages: tuple[ChatMessage, ...]
    learn_from: int = 0
    tools: Any = None
    # (prompt, answer) for a base model without a chat template; None where only a template can say.
    plain: tuple[str, str] | None = None


Row = Text | Dialogue


def _text(row: Mapping[str, Any], where: str) -> Row:
    return Text(where, _string(row, "text", where))


def _messages(row: Mapping[str, Any], where: str) -> Row:
    messages = _turns(row["messages"], where)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise BadData(f"{where}: expected at least one message of the assistant to learn from", hint=SKIP)
    return Dialogue(where, messages, tools=row.get("tools"))


def _completion(row: Mapping[str, Any], where: str) -> Row:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        prompt, completion = _turns(row["prompt"], where), _turns(row["completion"], where)
        return Dialogue(where, prompt + completion, learn_from=len(prompt), tools=row.get("tools"))
    return _exchange(where, _string(row, "prompt", where, empty=True), _string(row, "completion", where))


def _alpaca(row: Mapping[str, Any], where: str) -> Row:
    """Without a chat template the prompt is the one that Stanford's Alpaca was trained with."""
    instruction, output = _string(row, "instruction", where), _string(row, "output", where)
    extra = _string(row, "input", where, empty=True) if row.get("input") else ""
    dialogue = _exchange(where, f"{instruction}\n\n{extra}" if extra else instruction, output)
    context, block = (", paired with an input that provides further context", f"### Input:\n{extra}\n\n")
    prompt = (
        f"Below is an instruction that describes a task{context if extra else ''}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{block if extra else ''}### Response:\n"
    )
    return replace(dialogue, plain=(prompt, output))


# By the keys that tell a kind; the first that fits counts.
KINDS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Row]] = {
    ("messages",): _messages,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _alpaca,
    ("text",): _text,
}


def _exchange(where: str, prompt: str, answer: str) -> Dialogue:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Dialogue(where, turns, learn_from=1, plain=(prompt, answer))


def _string(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise BadData(f"{where}: expected `{key}` to be a string, found {name_of(value)}", hint=SKIP)
    if not empty and not value.strip():
        raise BadData(f"{where}: expected `{key}` to hold text, it is empty", hint=SKIP)
    return value


def _turns(value: object, where: str) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise BadData(f"{where}: expected a list of messages, found {name_of(value)}", hint=SKIP)
    for turn in value:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
            raise BadData(f"{where}: expected each message to be an object with `role` and `content`", hint=SKIP)
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise BadData(f"{where}: expected the `content` of a message to be a string", hint=SKIP)
    return tuple(value)


def name_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return "an empty array" if value == [] else names.get(type(value), "a number")
