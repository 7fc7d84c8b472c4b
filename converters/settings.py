"""JSON files from people and from hubs, read with the type and range of every value checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneround.errors import BadAdapter, BadData, BadModel
from oneround.text import shown

_LARGEST = 256 << 20  # bytes; the largest tokenizer.json in use is a tenth of it


class Settings:
    """A JSON object, and where it came from, for the sentences that say what is wrong with it.

    Every getter raises `wrong` (BadModel or BadAdapter) with the file and the key, and treats null as absent.
    """

    def __init__(self, values: Mapping[str, Any], source: str, wrong: type[BadData]) -> None:
        self.values = values
        self.source = source
        self._wrong = wrong

    def bad(self, message: str, hint: str = "") -> BadData:
        return self._wrong(f"{self.source}: {message}", hint=hint)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(f"{key} is {shown(value)}; expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self.get(key, default)
        # float() of a JSON integer of thousands of digits overflows; a comparison of it does not.
        good = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
        if not good or not math.isfinite(value) or (positive and value <= 0):
            raise self.bad(f"{key} is {shown(value)}; expected a {'positive ' if positive else ''}number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.bad(f"{key} is {shown(value)}; expected a string")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(f"{key} is {shown(value)}; expected true or false")
        return value

    def table(self, key: str) -> Settings:
        """The object under `key`; an empty one when it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.bad(f"{key} is {shown(value)}; expected an object")
        return Settings(value, f"{self.source}: {key}", self._wrong)

    def items(self, key: str) -> list[Any]:
        """The list under `key`; an empty one when it is absent."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise self.bad(f"{key} is {shown(value)}; expected a list")
        return value


def read(path: Path, wrong: type[BadModel] | type[BadAdapter]) -> Settings:
    """Read a JSON object from a file.

    Raises:
        BadModel or BadAdapter, as asked: the file is not there, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise wrong(f"{path} is larger than {_LARGEST >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise wrong(f"{path} is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(f"{path} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise wrong(f"{path} is not a JSON object")
    return Settings(values, str(path), wrong)
