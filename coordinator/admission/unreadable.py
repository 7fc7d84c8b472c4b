"""What is said of a contribution that could not be looked at."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from oneround.errors import BadData
from oneround.text import one_line

Reason = Callable[[BaseException], str]

# By what came of the look; the first that fits.
REASONS: dict[type[BaseException], Reason] = {
    BadData: lambda error: str(error),
    BrokenProcessPool: lambda error: "the process that read it died of it",
    Exception: lambda error: f"it cannot be read: {type(error).__name__}: {error}",
}


def reason(error: Exception, file: Path | None = None) -> str:
    """Why a contribution takes no part whose look ended so, in one line. A fault of ours on a stranger's file is a
    reason not to take it, and to say so. `file`: where it lies, which is nobody's business."""
    text = next(words for kind, words in REASONS.items() if isinstance(error, kind))(error)
    return one_line(text.replace(str(file), "the upload") if file else text)
