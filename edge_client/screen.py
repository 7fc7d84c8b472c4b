"""What the person sees: bars in a terminal, plain lines in a log, JSON lines for scripts. The same events in all."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

# Every event that the client reports, and its sentence.
SENTENCES = {
    "pinned": "First time at {server}: its key is now pinned.\n  fingerprint  {fingerprint}",
    "terms": "\nJob [bold]{job}[/bold], open until {until}\n"
    "  at         {server}, key {key}\n"
    "  base       {base}\n"
    "  data       {data}\n"
    "What leaves this machine, and nothing else:\n"
    "  to join    {to_join}\n"
    "  meanwhile  {meanwhile}\n"
    "  at last    {at_last}\n"
    "The files stay here. The adapter is what was learnt from them.",
    "declined": "Nothing was sent, and the coordinator knows nothing of this machine.",
    "several": "Several coordinators make themselves known on this network:\n{rows}",
    "found": "Found [bold]{name}[/bold] on this network, at {server}",
    "moved": "Nobody answers at {before}; the coordinator with the same key is at {server} now.",
    "joined": "Joined [bold]{job}[/bold] at {server} as {client}",
    "plan": "  base      {base}\n"
    "  data      {examples:,} examples, {tokens:,} target tokens; {held_out:,} rows held out. They stay here.\n"
    "  training  {steps:,} steps with {backend} on {device}\n"
    "  to send   {send_bytes:,} bytes and a header, once: LoRA of rank {rank} for {modules} modules",
    "truncated": "[yellow]{truncated} examples were longer than {max_seq_len} tokens and were cut; "
    "{dropped} had no answer left and were dropped.[/yellow]",
    "skipped": "[yellow]{skipped} bad rows were skipped.[/yellow]",
    "continued": "Training goes on after step {step} of {steps}",
    "anew": "[yellow]The data or the job is not what it was when training was interrupted; it starts anew.[/yellow]",
    "not_kept": "[yellow]How far training is cannot be kept: {why}. If it is interrupted now, steps are lost.[/yellow]",
    "resumed": "Already trained; the adapter waits in {folder}",
    "trained": "Trained {steps} steps in {seconds:.0f} s; loss {loss:.3f}",
    "retry": "{why}; trying again in {seconds:.0f} s",
    "receipt": "[green]Receipt[/green]\n  sent      {size:,} bytes\n  sha256    {digest}",
    "pending": "It has not been looked at yet; `coordinator show {job}`, over there, will say what is made of it.",
    "left": "Left {job}. What was sent takes no part in what is published from now on; what is here stays.",
    "done": "You may close this now. The result will be there with:\n  edge-client pull {job}",
    "waiting": "Waiting for the publication ({state})",
    "published": "[green]Published[/green] v{version}. Take it with:\n  edge-client pull {job}",
    "pulled": "{name}  {size:,} bytes",
    "folder": "In {folder}",
}

Advance = Callable[..., None]
_PLAIN_EVERY = 5.0  # seconds between lines of progress without a terminal
_JSON_EVERY = 1.0


_LABELLED = re.compile(r"  (\S.*?)  +(.+)")  # a line of a sentence that is a row of a small table


class Left(ProgressColumn):
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
        Left(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
    )


class Screen:
    """Reports events; `as_json` prints each as a line of JSON instead of a sentence."""

    def __init__(self, as_json: bool = False) -> None:
        self._json = as_json
        self._console = Console(highlight=False, emoji=False)

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

    def say(self, event: str, **fields: object) -> None:
        """Report that something happened."""
        sentence = SENTENCES[event]
        if self._json:
            self._print_json(event, fields)
        else:
            self._print(sentence.format(**{name: _plain(value) for name, value in fields.items()}))

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """Show that something goes on whose length is not known."""
        if self._json or not self._console.is_terminal:
            yield
            return
        with self._console.status(label):
            yield

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Report progress: call what is given with how much of `total` is done, and a few words of detail."""
        if self._json or not self._console.is_terminal:
            yield self._lines(label, total)
            return
        columns = (TextColumn("{task.description:<10}"), *columns_of_a_bar())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(label, total=total, detail="")

            def advance(done: int, detail: str = "", **_: object) -> None:
                progress.update(task, completed=done, detail=detail)

            yield advance

    def _lines(self, label: str, total: int) -> Advance:
        started = last = time.monotonic()
        every = _JSON_EVERY if self._json else _PLAIN_EVERY

        def advance(done: int, detail: str = "", **fields: object) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < every and done < total:
                return
            last = now
            left = (now - started) * (total - done) / max(done, 1)
            if self._json:
                self._print_json(
                    "progress", {"what": label, "done": done, "total": total, "seconds_left": left, **fields}
                )
            else:
                print(
                    f"{label} {done}/{total} ({100 * done // max(total, 1)} %), {left:.0f} s left {detail}", flush=True
                )

        return advance

    def _print(self, said: str) -> None:
        """Labelled lines hang where a terminal is narrow; commands are not broken, so that they can be copied."""
        if not self._console.is_terminal:
            self._console.print(said, soft_wrap=True)
            return
        for is_row, lines in itertools.groupby(said.split("\n"), lambda line: bool(_LABELLED.fullmatch(line))):
            if not is_row:
                for line in lines:
                    self._console.print(line, soft_wrap=line.startswith("  "))
                continue
            rows = Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2, 0, 0))
            for line in lines:
                label, text = _LABELLED.findall(line)[0]
                rows.add_row(f"  {label}", text)
            self._console.print(rows)

    def _print_json(self, event: str, fields: dict[str, object]) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)
        sys.stdout.flush()


def _plain(value: object) -> object:
    """Names come from elsewhere too: no markup, and no control characters that a terminal would obey."""
    if not isinstance(value, str):
        return value
    return escape("".join(letter for letter in value if letter.isprintable() or letter == "\n"))


def _duration(seconds: float) -> str:
    """As `7 s`, `12:07` or `3:12:07`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
