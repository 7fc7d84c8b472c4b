"""Rows → examples: token ids, and which of them are to be learnt. Knows no training framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converters import custom_code
from edge_client.data.rows import SKIP, ChatMessage, Dialogue, Row, Rows, Text, load
from oneround.errors import BadData, BadModel, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Example", "Row", "Rows", "Tokenised", "load", "load_tokenizer", "tokenise", "windows"]


@dataclass(frozen=True)
class Example:
    """Token ids (length,) int32, and whether each is a target (length,) bool; the first token never is."""

    ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    @property
    def num_targets(self) -> int:
        """Target tokens."""
        return int(self.is_target.sum())


@dataclass(frozen=True)
class Tokenised:
    """Examples, and how many rows were cut at max_seq_len, had no target left, or were bad; and the longest row, in
    tokens before anything was cut."""

    examples: tuple[Example, ...]
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    longest: int = 0


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a local model folder; code in the folder is never run.

    Raises:
        BadModel: the folder holds no tokenizer that transformers can load.
        UsageError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError("training needs transformers", hint="pip install 'oneround[torch]'") from error
    custom_code.check(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the settings are a stranger's, and over them the library raises anything
        why = str(error).partition("\n")[0] or type(error).__name__
        raise BadModel(
            f"{folder} holds no tokenizer that can be loaded: {why}", hint=custom_code.hint(folder)
        ) from error


def tokenise(rows: Iterable[Row], tokenizer: Tokenizer, max_seq_len: int, *, skip_bad_rows: bool = False) -> Tokenised:
    """Rows → examples of at most `max_seq_len` tokens.

    Text is what the tokenizer makes of it (with its BOS, if it adds one) and the end-of-text token; long text is cut
    into windows, and nothing of it is lost. Conversations go through the chat template and are truncated, which is
    counted; `prompt`/`completion` and Alpaca rows need no template, without one they are concatenated and ended.

    Raises:
        BadData: a conversation that the model's chat template refuses, or `messages` for a model without one.
    """
    examples: list[Example] = []
    truncated = dropped = skipped = longest = 0
    for row in rows:
        if isinstance(row, Text):
            ids = _encoded(row.text, tokenizer)
            longest = max(longest, len(ids))
            pieces = windows(ids, max_seq_len)
            dropped += not pieces
            examples += pieces
            continue
        try:
            example = _plain(row, tokenizer) if tokenizer.chat_template is None else _chat(row, tokenizer)
        except BadData:
            if not skip_bad_rows or tokenizer.chat_template is None:
                raise
            skipped += 1
            continue
        longest = max(longest, len(example.ids))
        cut = Example(example.ids[:max_seq_len], example.is_target[:max_seq_len])
        if not cut.num_targets:
            dropped += 1
            continue
        truncated += len(cut.ids) < len(example.ids)
        examples.append(cut)
    return Tokenised(tuple(examples), truncated, dropped, skipped, longest)


def windows(ids: Sequence[int], max_seq_len: int) -> list[Example]:
    """Cut a text's tokens into examples of at most `max_seq_len` (≥ 2) tokens.

    Neighbours share one token, a target in the one and context in the other, so every token but the text's first is
    a target exactly once.
    """
    whole = np.asarray(ids, dtype=np.int32)
    pieces = (whole[start : start + max_seq_len] for start in range(0, len(whole) - 1, max_seq_len - 1))
    return [Example(piece, np.arange(len(piece)) > 0) for piece in pieces]


def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's ids with the end-of-text token, if the model has one."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    eos: int | None = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _plain(row: Dialogue, tokenizer: Tokenizer) -> Example:
    if row.plain is None:
        raise BadData(
            f"{row.where}: the model has no chat template, so it cannot take `messages`",
            hint="use an instruction-tuned model, or give rows `prompt` and `completion`",
        )
    prompt, answer = row.plain
    ids = _encoded(prompt + answer, tokenizer)
    return _example(ids, [(_shared(ids, tokenizer(prompt, verbose=False)["input_ids"]), len(ids))])


def _chat(row: Dialogue, tokenizer: Tokenizer) -> Example:
    """The rendered conversation; a turn's tokens are those that the template adds after its generation prompt."""

    def rendered(turns: Sequence[ChatMessage], ask: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tools=row.tools, add_generation_prompt=ask, return_dict=False
        )
        return ids

    turns = row.messages
    try:
        ids = rendered(turns, False)
        spans = []
        for i in range(row.learn_from, len(turns)):
            if turns[i]["role"] == "assistant":
                start = _shared(ids, rendered(turns[:i], True)) if i else 0
                spans.append((start, _end(ids, start, rendered(turns[: i + 1], False))))
    except Exception as error:  # a template is a program from the model's folder: it may raise anything
        raise BadData(
            f"{row.where}: the model's chat template refuses this conversation: {error}", hint=SKIP
        ) from error
    return _example(ids, spans)


def _example(ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> Example:
    is_target = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        is_target[max(start, 1) : end] = True
    return Example(np.asarray(ids, dtype=np.int32), is_target)


def _end(ids: Sequence[int], start: int, spoken: Sequence[int]) -> int:
    """Where the turn ends that begins at `start`; `spoken` is the conversation up to and with it.

    Some templates write a turn otherwise when it is the last: Qwen3 puts (empty) thoughts in front of it. Then the turn
    is what both end with.
    """
    shared = _shared(ids, spoken)
    if shared == len(spoken):
        return shared
    for skipped in range(start, len(spoken)):
        rest = spoken[skipped:]
        if ids[start : start + len(rest)] == rest:
            return max(shared, start + len(rest))
    return shared


def _shared(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common; tokens may merge across the end of a prompt."""
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
