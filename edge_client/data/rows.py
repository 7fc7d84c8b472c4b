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

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_client.data import files
from edge_client.data.files import ACCEPTED, SKIP
from edge_client.data.hold_out import hold_out
from edge_client.data.kinds import KINDS, ChatMessage, Dialogue, Row, Text, name_of
from oneround.errors import BadData

__all__ = ["SKIP", "ChatMessage", "Dialogue", "Row", "Rows", "Text", "load"]


@dataclass(frozen=True)
class Rows:
    """Rows to train on, rows held out, the files they came from, and how many bad rows were skipped."""

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
    training, validation = files.chosen(path)
    train, skipped = _read(training, skip_bad_rows)
    if validation:
        held_out, also = _read(validation, skip_bad_rows)
        return Rows(train, held_out, training + validation, skipped + also)
    train, held_out = hold_out(train)
    return Rows(train, held_out, training, skipped)


def _read(paths: tuple[Path, ...], skip_bad_rows: bool) -> tuple[tuple[Row, ...], int]:
    rows: list[Row] = []
    skipped: list[str] = []
    for file in paths:
        for row in _rows(file):
            if not isinstance(row, BadData):
                rows.append(row)
            elif skip_bad_rows:
                skipped.append(str(row))
            else:
                raise row
    if not rows:
        why = f"; the first problem: {skipped[0]}" if skipped else ""
        raise BadData(f"no rows in {', '.join(map(str, paths))}{why}", hint=ACCEPTED)
    return tuple(rows), len(skipped)


def _rows(file: Path) -> Iterator[Row | BadData]:
    """The rows of one file; a bad row is handed out as its error, a file that cannot be read raises."""
    keys: tuple[str, ...] = ()
    for line, value in files.values(file):
        where = f"{file}:{line}"
        if isinstance(value, BadData):
            yield value
            continue
        if not isinstance(value, dict):
            yield BadData(f"{where}: expected a JSON object, found {name_of(value)}", hint=SKIP)
            continue
        kind = keys or next((fields for fields in KINDS if value.keys() >= set(fields)), ())
        accepted = f"{' and '.join(kind)}, as in the rows before" if kind else ACCEPTED
        if not kind or not value.keys() >= set(kind):
            yield BadData(f"{where}: found the keys {', '.join(value) or '(none)'}; expected {accepted}", hint=SKIP)
            continue
        keys = kind
        try:
            json.dumps(value, ensure_ascii=False).encode()
            yield KINDS[keys](value, where)
        except UnicodeEncodeError:
            yield BadData(f"{where}: holds half a surrogate pair, which no UTF-8 text can", hint=SKIP)
        except BadData as error:
            yield error
