"""What the person sees: bars in a terminal, plain lines in a log, JSON lines for scripts. The same events in all."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from edge_client.ui.events import Event, ProgressMade

_LONGEST = 2000  # letters of a field
_PLAIN_EVERY = 5.0  # seconds between lines of progress without a terminal
_JSON_EVERY = 1.0


class Advance(Protocol):
    """Reports how much of a long step is done; `detail` is for people, the rest for scripts."""

    def __call__(
        self, done: int, detail: str = "", *, loss: float | None = None, tokens_per_second: float | None = None
    ) -> None: ...


_LABELLED = re.compile(r"  (\S.*?)  +(.+)")  # a line of a sentence that is a row of a small table


class TimeLeft(ProgressColumn):
    """How long still; once it is done, how long it took."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {_duration(task.finished_time or 0)}", style="progress.elapsed")
        left = task.time_remaining
        return Text("" if left is None else f"{_duration(left)} left", style="progress.remaining")


def columns_of_a_bar() -> tuple[ProgressColumn, ...]:
    """How far, how long still, and the task's `detail`."""
    return (
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8, max_width=40)),
        TaskProgressColumn(),
        TimeLeft(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
    )


class Screen:
    """Reports events; `as_json` prints each as a line of JSON instead of a sentence. `aside`: to standard error, where
    standard output is for something else."""

    def __init__(self, as_json: bool = False, *, aside: bool = False) -> None:
        self._json = as_json
        self._console = Console(highlight=False, emoji=False, stderr=aside)

    @property
    def can_ask(self) -> bool:
        """Whether somebody is there to read and to answer."""
        return not self._json and self._console.is_terminal and sys.stdin.isatty()

    async def ask(self, question: str) -> str:
        """What the person types, in lower case; empty when they end the input. Ctrl-C ends it as it ends any wait."""
        self._console.print(question, end=" ")
        loop = asyncio.get_running_loop()
        typed: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sys.stdin, typed.set_result, None)
        try:
            await typed
        finally:
            loop.remove_reader(sys.stdin)
        line = sys.stdin.readline()
        if not line.endswith("\n"):
            self._console.print()
        return line.strip().lower()

    def say(self, event: Event) -> None:
        """Report that something happened."""
        if self._json:
            print(json.dumps({"event": event.event, **event.as_json()}), flush=True)
        else:
            self._print(sentence(event))

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """Show that something goes on whose length is not known."""
        if self._json or not self._console.is_terminal:
            yield
            return
        with self._console.status(label):
            yield

    @contextmanager
    def bar(self, label: str, total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
        """Report progress: call what this yields with how much of `total` is done, and a few words of detail.

        The time left follows from `clock`, in seconds."""
        if self._json or not self._console.is_terminal:
            yield self._lines(label, total, clock)
            return
        columns = (TextColumn("{task.description:<10}"), *columns_of_a_bar())
        with Progress(*columns, console=self._console, get_time=clock) as progress:
            task = progress.add_task(label, total=total, detail="")

            def advance(
                done: int, detail: str = "", *, loss: float | None = None, tokens_per_second: float | None = None
            ) -> None:
                progress.update(task, completed=done, detail=detail)

            yield advance

    def _lines(self, label: str, total: int, clock: Callable[[], float]) -> Advance:
        started = last = clock()
        every = _JSON_EVERY if self._json else _PLAIN_EVERY

        def advance(
            done: int, detail: str = "", *, loss: float | None = None, tokens_per_second: float | None = None
        ) -> None:
            nonlocal last
            now = clock()
            if now - last < every and done < total:
                return
            last = now
            left = (now - started) * (total - done) / max(done, 1)
            progress = ProgressMade(label, done, total, left, loss, tokens_per_second)
            if self._json:
                self.say(progress)
            else:
                self._print(f"{sentence(progress)} {escape(detail)}".rstrip())

        return advance

    def _print(self, text: str) -> None:
        """Labelled lines hang where a terminal is narrow; commands are not broken, so that they can be copied."""
        if not self._console.is_terminal:
            self._console.print(text, soft_wrap=True)
            return
        for is_row, lines in itertools.groupby(text.split("\n"), lambda line: bool(_LABELLED.fullmatch(line))):
            if not is_row:
                for line in lines:
                    self._console.print(line, soft_wrap=line.startswith("  "))
                continue
            rows = Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2, 0, 0))
            for line in lines:
                label, value = _LABELLED.findall(line)[0]
                rows.add_row(f"  {label}", value)
            self._console.print(rows)


def sentence(event: Event) -> str:
    """What an event says to people, in rich's markup."""
    names = [name for _, name, _, _ in string.Formatter().parse(event.template) if name]
    lines = event.lines()
    return event.template.format(**{name: _plain(getattr(event, name), name in lines) for name in names})


def _plain(value: object, is_lines: bool) -> object:
    """Names come from elsewhere too: no markup, no control characters that a terminal obeys, no lines like ours."""
    if not isinstance(value, str):
        return value
    kept = value if is_lines else value.replace("\n", " ")[:_LONGEST]
    return escape("".join(letter for letter in kept if letter.isprintable() or letter == "\n"))


def _duration(seconds: float) -> str:
    """As `7 s`, `12:07` or `3:12:07`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
