"""Files of a person → the JSON values in them, with their lines.

Files: `.jsonl` (a JSON object a line), `.json` (an array of such objects, or lines), `.parquet`, `.txt` (one text a
file), or a folder of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oneround.errors import BadData, UsageError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
ACCEPTED = "a row has `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`"
SKIP = "put the row right, or leave such rows out with --skip-bad-rows"
_JSON = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def require(path: Path, command: str) -> None:
    """Raises BadData when a person's files are not there; `command` is to be run with others."""
    if not path.exists():
        raise BadData(f"there is no file or folder {path}", hint=f"say where your files are: {command} --data PATH")


def chosen(path: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files to train on, and validation files, of a file or a folder.

    Raises:
        BadData: there are none.
    """
    accepted = f"accepted are files ending in {', '.join(SUFFIXES)}, or a folder of these"
    if path.is_dir():
        present = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.name[0] != "." and f.is_file())
        if not present:
            raise BadData(f"{path} holds no training data: {accepted}", hint=f"{ACCEPTED}; name the place with --data")
        train, validation = _named(path, "train"), _named(path, "valid", "validation")
        if train:
            return train, validation or _named(path, "test")
        rest = tuple(file for file in present if file not in validation)
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


def values(file: Path) -> Iterator[tuple[int, object]]:
    """(line, value) of each row of a file, from 1; a line of .jsonl that is not JSON comes out as its error.

    Raises:
        BadData: the file cannot be read, or is not what its suffix says.
        UsageError: reading Parquet needs pyarrow.
    """
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
    space = _SPACE.match(text, at)
    assert space
    return space.end()
