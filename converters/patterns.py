"""Module names by the regular expressions that PEFT's settings hold, which are a stranger's.

Python's `re` cannot be stopped, and a short expression can keep it busy for years. Expressions without repetition or
choice, which are nearly all there are, are matched here; others in a child process that has some seconds.

Source: peft 0.21, utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from converters.settings import Settings

_PLAIN = re.compile(r"\^?(?:\\?\.|[\w-])+")
SECONDS = 10.0  # for all names of an adapter
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(pattern) for pattern in patterns]
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    sys.exit(f"{error}")
json.dump([next((n for n, known in enumerate(compiled) if known.match(name)), None) for name in names], sys.stdout)
"""


def first_keys(patterns: Settings, names: Iterable[str], seconds: float = SECONDS) -> dict[str, str]:
    """For each name the first key of `patterns` that matches it from the right at a dot; others are left out.

    Raises:
        BadAdapter, as the settings do: a key is no regular expression, or one that takes too long.
    """
    keys, names = list(patterns.values), list(names)
    if not keys:
        return {}
    expressions = [rf"(.*\.)?({key})$" for key in keys]
    if all(_PLAIN.fullmatch(key) for key in keys):
        compiled = [re.compile(expression) for expression in expressions]
        matches = [next((n for n, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names]
    else:
        matches = _in_a_child(patterns, expressions, names, seconds)
    return {name: keys[n] for name, n in zip(names, matches, strict=True) if n is not None}


def _in_a_child(
    patterns: Settings, expressions: Sequence[str], names: Sequence[str], seconds: float
) -> list[int | None]:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([expressions, names]),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise patterns.bad(f"its regular expressions take more than {seconds:g} s to match") from None
    if child.returncode != 0:
        complaints = child.stderr.strip().splitlines() or ["it cannot be used"]
        raise patterns.bad(f"one of its keys is not a regular expression: {complaints[-1]}")
    matches: list[int | None] = json.loads(child.stdout)
    return matches
