"""Files of a person → rows, some of them held out.

Files: `.jsonl` (a JSON object a line), `.json` (an array of such objects, or lines), `.parquet`, `.txt` (one text a
file), or a folder of these. Rows, recognised per file by the first that fits:

    messages                     a conversation; every assistant turn is learnt, nothing else
    prompt, completion           two strings (or two lists of messages); the completion is learnt
    instruction, [input], output Alpaca; the output is learnt
    text                         everything is learnt

A folder with `train.*` is read as mlx-lm does: `train.*` to train on, `valid.*` or `validation.*`, else `test.*`, held
out. Otherwise all its files count, in the order of their names. Without a validation file a tenth is held out, by a
hash of each row's content: the same row lands on the same side whatever is around it, and equal rows stay together.
Only where a side would be empty the row whose hash is nearest is taken.
A lone text is cut in two: its last tenth is held out, from a paragraph's, line's or word's end if there is one near.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oneround.errors import BadData, UsageError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
ACCEPTED = "a row has `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`"
SKIP = "put the row right, or leave such rows out with --skip-bad-rows"
_HELD_OUT = 0.1
_JSON = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")

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


@dataclass(frozen=True)
class Rows:
    """What was found: rows to train on, rows held out, the files they came from, and how many bad rows were skipped."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    files: tuple[Path, ...]
    skipped: int = 0


def load(path: Path, *, skip_bad_rows: bool = False) -> Rows:
    """Read a file or a folder, and hold a part out.

    Raises:
        BadData: nothing there, not UTF-8, not JSON, or a bad row, named by file and line. With `skip_bad_rows` bad
            rows are left out and counted; a file that cannot be read at all still raises.
    """
    training, validation = _files(path)
    train, skipped = _read(training, skip_bad_rows)
    if validation:
        held_out, also = _read(validation, skip_bad_rows)
        return Rows(train, held_out, training + validation, skipped + also)
    train, held_out = _hold_out(train)
    return Rows(train, held_out, training, skipped)


def _files(path: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files to train on, and validation files."""
    accepted = f"accepted are files ending in {', '.join(SUFFIXES)}, or a folder of these"
    if path.is_dir():
        known = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.name[0] != "." and f.is_file())
        if not known:
            raise BadData(f"{path} holds no training data: {accepted}", hint=f"{ACCEPTED}; name the place with --data")
        train, validation = _named(path, "train"), _named(path, "valid", "validation")
        if train:
            return train, validation or _named(path, "test")
        rest = tuple(file for file in known if file not in validation)
        return (rest, validation) if rest else (validation, ())
    if not path.exists():
        raise BadData(f"{path} is not there", hint=f"name a file or folder with --data; {accepted}")
    if path.suffix not in SUFFIXES:
        raise BadData(f"{path}: this kind of file is not known; {accepted}", hint=ACCEPTED)
    return (path,), _named(path.parent, "valid", "validation", "test") if path.stem == "train" else ()


def _named(folder: Path, *stems: str) -> tuple[Path, ...]:
    """The first file of these names, or none."""
    candidates = (folder / (stem + suffix) for stem in stems for suffix in SUFFIXES)
    return tuple(file for file in candidates if file.is_file())[:1]


def _read(files: tuple[Path, ...], skip_bad_rows: bool) -> tuple[tuple[Row, ...], int]:
    rows: list[Row] = []
    skipped: list[str] = []
    for file in files:
        for row in _rows(file):
            if not isinstance(row, BadData):
                rows.append(row)
            elif skip_bad_rows:
                skipped.append(str(row))
            else:
                raise row
    if not rows:
        why = f"; the first problem: {skipped[0]}" if skipped else ""
        raise BadData(f"no rows in {', '.join(map(str, files))}{why}", hint=ACCEPTED)
    return tuple(rows), len(skipped)


def _rows(file: Path) -> Iterator[Row | BadData]:
    """The rows of one file; a bad row is handed out as its error, a file that cannot be read raises."""
    keys: tuple[str, ...] = ()
    for line, value in _values(file):
        where = f"{file}:{line}"
        if isinstance(value, BadData):
            yield value
            continue
        if not isinstance(value, dict):
            yield BadData(f"{where}: expected a JSON object, found {_name(value)}", hint=SKIP)
            continue
        found = keys or next((fields for fields in _ROWS if value.keys() >= set(fields)), ())
        wanted = f"{' and '.join(found)}, as in the rows before" if found else ACCEPTED
        if not found or not value.keys() >= set(found):
            yield BadData(f"{where}: found the keys {', '.join(value) or '(none)'}; expected {wanted}", hint=SKIP)
            continue
        keys = found
        try:
            json.dumps(value, ensure_ascii=False).encode()
            yield _ROWS[keys](value, where)
        except UnicodeEncodeError:
            yield BadData(f"{where}: holds half a surrogate pair, which no UTF-8 text can", hint=SKIP)
        except BadData as error:
            yield error


def _values(file: Path) -> Iterator[tuple[int, object]]:
    """(line, value) of each row of a file, from 1; a line of .jsonl that is not JSON comes out as its error."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise BadData(f"{file} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise BadData(f"{file}: the file is empty", hint=ACCEPTED)
    if file.suffix == ".txt":
        yield 1, {"text": _decoded(content, file, 1)}
    elif file.suffix == ".json" and content.lstrip()[:1] == b"[":
        try:
            yield from _elements(_decoded(content, file, 1))
        except json.JSONDecodeError as error:
            raise BadData(f"{file}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise BadData(f"{file}: not JSON that can be read: {error}") from error
    else:
        for line, text in enumerate(content.split(b"\n"), start=1):
            if text.strip():
                yield line, _line(text, file, line)


def _parquet(file: Path) -> Iterator[tuple[int, object]]:
    """(row, value), with what is null left out: a table has every column in every row, and JSON has not."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{file}: reading Parquet takes pyarrow", hint="pip install 'oneround[parquet]'") from None
    row = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=1024, use_threads=False):
                for value in batch.to_pylist():
                    row += 1
                    yield row, _without_nulls(value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadData(f"{file} is not a Parquet file that can be read: {reason}") from error
    if not row:
        raise BadData(f"{file}: the file is empty", hint=ACCEPTED)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _line(text: bytes, file: Path, line: int) -> object:
    try:
        return json.loads(_decoded(text, file, line))
    except json.JSONDecodeError as error:
        problem = f"expected a JSON object on one line: {error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON that can be read: {error}"
    except BadData as error:
        return error
    return BadData(f"{file}:{line}: {problem}", hint=SKIP)


def _decoded(content: bytes, file: Path, line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        problem = f"{file}:{line}: expected UTF-8 text, found byte 0x{content[error.start]:02x}"
        raise BadData(
            problem, hint="save the file as UTF-8, or leave bad lines of a .jsonl out with --skip-bad-rows"
        ) from error


def _elements(text: str) -> Iterator[tuple[int, object]]:
    """(line, element) of a JSON array; json.loads would not say on which line an element begins."""
    at, counted, line = _after_space(text, text.index("[") + 1), 0, 1
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, at = _JSON.raw_decode(text, at)
        yield line, value
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected , or ]", text, at)
    if _after_space(text, at + 1) != len(text):
        raise json.JSONDecodeError("expected the file's end after ]", text, at + 1)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


# ---- one row ----


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


_ROWS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Row]] = {
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
        raise BadData(f"{where}: expected `{key}` to be a string, found {_name(value)}", hint=SKIP)
    if not empty and not value.strip():
        raise BadData(f"{where}: expected `{key}` to hold text, it is empty", hint=SKIP)
    return value


def _turns(value: object, where: str) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise BadData(f"{where}: expected a list of messages, found {_name(value)}", hint=SKIP)
    for turn in value:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
            raise BadData(f"{where}: expected each message to be an object with `role` and `content`", hint=SKIP)
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise BadData(f"{where}: expected the `content` of a message to be a string", hint=SKIP)
    return tuple(value)


def _name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return "an empty array" if value == [] else names.get(type(value), "a number")


# ---- held out ----


def _hold_out(rows: tuple[Row, ...]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(train, held out): by content, at least one row on either side."""
    if len(rows) == 1:
        return _cut(rows[0])
    shares = [_share(row) for row in rows]
    lowest, highest = min(shares), max(shares)
    held = [share < _HELD_OUT or share == lowest for share in shares]
    if all(held):
        held = [share < highest for share in shares]
    if not any(held):  # all rows are equal
        held[0] = True
    return (
        tuple(row for row, out in zip(rows, held, strict=True) if not out),
        tuple(row for row, out in zip(rows, held, strict=True) if out),
    )


def _share(row: Row) -> float:
    """A number in [0, 1) that depends on nothing but the row's content."""
    content = row.text if isinstance(row, Text) else [row.messages, row.tools]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _cut(row: Row) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """A lone text in two: nine tenths and the last one, within a twentieth of the text's length."""
    more = "add rows, or put a validation file beside it"
    if isinstance(row, Dialogue):
        raise BadData(f"{row.where}: the only example; at least two are needed, as one is held out", hint=more)
    low, middle, high = (int(len(row.text) * (1 - _HELD_OUT + by)) for by in (-0.05, 0, 0.05))
    ends = (row.text.rfind(mark, low, high) + len(mark) for mark in ("\n\n", "\n", " ") if mark in row.text[low:high])
    end = next(ends, middle)
    if not row.text[:end].strip() or not row.text[end:].strip():
        raise BadData(f"{row.where}: the text is too short to hold a tenth of it out", hint=more)
    return (replace(row, text=row.text[:end]),), (replace(row, text=row.text[end:]),)
