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
    "unknown": "The coordinator at {server} is not known here. Its key:\n"
    "  fingerprint  {fingerprint}\n"
    "`coordinator serve` prints the right one over there; ask whoever runs it.",
    "key_changed": "The coordinator at {server} has a new key, which the old one has signed. It is pinned now:\n"
    "  before       {before}\n"
    "  now          {now}",
    "trusted": "Pinned for {server}:\n  fingerprint  {fingerprint}",
    "unpinned": "No longer pinned for {server}:\n  fingerprint  {fingerprint}",
    "terms": "\nJob [bold]{job}[/bold], open until {until}\n"
    "  at         {server}, key {key}\n"
    "  base       {base}\n"
    "  data       {data}\n"
    "  trains     {trains}\n"
    "  takes      {takes}\n"
    "What leaves this machine, and nothing else:\n"
    "  to join    {to_join}\n"
    "  meanwhile  {meanwhile}\n"
    "  at last    {at_last}\n"
    "The files stay here. The adapter is what was learnt from them. No program comes with a job or its base.",
    "standing": "\nEvery job named {accept}, at {server}\n"
    "  data       {data}\n"
    "  trains     a LoRA as each job says, over its base model, which comes from the coordinator\n"
    "What leaves this machine for each of them, and nothing else:\n"
    "  to join    {to_join}\n"
    "  meanwhile  {meanwhile}\n"
    "  at last    {at_last}\n"
    "The files stay here. The adapter is what was learnt from them. No program comes with a job or its base.",
    "declined": "Nothing was sent. All that the coordinator has seen is this machine's network address and public key.",
    "several": "Several coordinators make themselves known on this network:\n{rows}",
    "found": "Found [bold]{name}[/bold] on this network, at {server}",
    "moved": "Nobody answers at {before}; the coordinator with the same key is at {server} now.",
    "asks": "Asked to take part in [bold]{job}[/bold]. The operator lets this machine in by\n"
    "  coordinator clients approve {id} --job {job}",
    "joined": "Joined [bold]{job}[/bold] at {server} as {client}",
    "plan": "  base      {base}\n"
    "  data      {examples:,} examples, {tokens:,} target tokens; {held_out:,} rows held out. They stay here.\n"
    "  training  {steps:,} steps with {backend} on {device}, {rounding}\n"
    "  to send   {send_bytes:,} bytes and a header, once: LoRA of rank {rank} for {modules} modules",
    "truncated": "[yellow]{truncated} examples were longer than {max_seq_len} tokens and were cut; "
    "{dropped} had no answer left and were dropped.[/yellow]",
    "skipped": "[yellow]{skipped} bad rows were skipped.[/yellow]",
    "parts": "A batch is taken in {parts} parts, one after the other, so that it fits into memory.",
    "halved": "[yellow]Memory ran out. From step {step} on a batch is taken in {parts} parts, one after "
    "the other.[/yellow]",
    "memory": "[yellow]Training may take {needed_gb:.1f} GB of memory, and {available_gb:.1f} GB are free: it may be "
    "slow, or the system may end it. Close other programs.[/yellow]",
    "continued": "Training goes on after step {step} of {steps}",
    "anew": "[yellow]The data or the job is not what it was when training was interrupted; it starts anew.[/yellow]",
    "paused": "[yellow]Training pauses: {why}.[/yellow] It goes on {until}.",
    "unpaused": "Training goes on after a pause of {seconds:.0f} s",
    "not_kept": "[yellow]How far training is cannot be kept: {why}. If it is interrupted now, steps are lost.[/yellow]",
    "resumed": "Already trained; the adapter waits in {folder}",
    "trained": "Trained {steps} steps in {seconds:.0f} s; loss {loss:.3f}",
    "retry": "{why}; trying again in {seconds:.0f} s",
    "receipt": "[green]Receipt[/green]\n  sent      {size:,} bytes\n  sha256    {digest}",
    "pending": "It has not been looked at yet; `coordinator show {job}`, over there, will say what is made of it.",
    "left": "Left {job}. What was sent takes no part in what is published from now on; what is here stays.",
    "done": "You may close this now. The result will be there with:\n  edge-client pull {job}",
    "staying": "Waiting at {server} for jobs named {accept}",
    "left_alone": "{job} is open there, and is none of those; it is left alone.",
    "no_part": "[yellow]No part in {job}: {why}.{again}[/yellow]",
    "service": "Written to {file}\n  jobs    {accept}, at {server}\n  data    {data}\n  trains  {when}",
    "service_runs": "It runs now and after every login. Its log:  {log}",
    "service_waits": "[yellow]It could not be started from here: {why}.[/yellow] Start it with:\n{commands}",
    "linger": "To have it run while nobody is logged in, too:  loginctl enable-linger",
    "uninstalled": "Removed {file}; nothing takes part by itself any more. What was joined and trained stays.",
    "not_installed": "There is no {file}; nothing takes part by itself.",
    "waiting": "Waiting for the publication ({state})",
    "published": "[green]Published[/green] v{version}. Take it with:\n  edge-client pull {job}",
    "signed": "v{version}, as the coordinator signed it",
    "signed_by_anyone": "[yellow]v{version} is as it was signed; without TLS nothing says whose key that was.[/yellow]",
    "unsigned": "[yellow]v{version} is not signed: nothing shows that it is what the coordinator published.[/yellow]",
    "receipt_by_anyone": "[yellow]Without TLS nothing says whose key signed it.[/yellow] It is\n  {fingerprint}",
    "receipt_kept": "Receipt for [bold]{job}[/bold], of {received}\n"
    "  signed by  {by}\n"
    "  sent       {size:,} bytes\n"
    "  sha256     {digest}\n"
    "  client     {client}\n"
    "  file       {file}",
    "no_receipt": "No receipt yet{of}. One comes with:  edge-client join --server HOST:PORT --data FILE_OR_FOLDER",
    "receipt_holds": "[green]The receipt holds.[/green]\n"
    "  signed by  {by}\n"
    "  key        {fingerprint}\n"
    "  job        {job}\n"
    "  received   {received}, {size:,} bytes\n"
    "  sha256     {digest}\n"
    "  client     {client}",
    "adapter_fits": "[green]It is for this adapter:[/green] {file}",
    "takes_part": "[green]It is part of v{version} of {job}[/green], with {weight:.1%} of the mean: {why}",
    "takes_no_part": "[yellow]It is no part of v{version} of {job}:[/yellow] {why}",
    "pulled": "{name}  {size:,} bytes",
    "chosen": "Taking {name}, {reason}: it needs about {needs} of this machine's {total} to run.",
    "full": "[yellow]Only {available} of memory are free now: close something before you run it.[/yellow]",
    "tight": "[yellow]That is more than half of its memory: it will be slow, or end what else is open.[/yellow]",
    "too_large": "[yellow]That is more than there is: it will hardly run here.[/yellow]",
    "folder": "In {folder}",
    "base_gguf": "Turning the base into a GGUF, once: {file}",
    "offline": "[yellow]{why}. Measuring v{version}, which is here.[/yellow]",
    "measuring": "Measuring {models} models on {examples} held-out examples, {tokens:,} target tokens, with llama.cpp",
    "evaluated": "{sentence}",
    "tells": "Of this the coordinator is told five numbers and nothing else: base {base_loss:.4f}, own {own_loss:.4f}, "
    "published {published_loss:.4f} nats per token, over {tokens:,} tokens, for v{version}.",
    "told": "Told. `coordinator show {job}`, over there, puts it beside the others'.",
    "serving": "Serving {model} at {url} until Ctrl-C",
}

Advance = Callable[..., None]
_LINES = ("rows", "commands")  # fields that hold lines of ours
_LONGEST = 2000  # letters of a field
_PLAIN_EVERY = 5.0  # seconds between lines of progress without a terminal
_JSON_EVERY = 1.0


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

    def say(self, event: str, **fields: object) -> None:
        """Report that something happened."""
        sentence = SENTENCES[event]
        if self._json:
            self._print_json(event, fields)
        else:
            self._print(sentence.format(**{name: _plain(value, name in _LINES) for name, value in fields.items()}))

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
        """Report progress: call what is given with how much of `total` is done, and a few words of detail.

        The time left is told by `clock`, in seconds."""
        if self._json or not self._console.is_terminal:
            yield self._lines(label, total, clock)
            return
        columns = (TextColumn("{task.description:<10}"), *columns_of_a_bar())
        with Progress(*columns, console=self._console, get_time=clock) as progress:
            task = progress.add_task(label, total=total, detail="")

            def advance(done: int, detail: str = "", **_: object) -> None:
                progress.update(task, completed=done, detail=detail)

            yield advance

    def _lines(self, label: str, total: int, clock: Callable[[], float]) -> Advance:
        started = last = clock()
        every = _JSON_EVERY if self._json else _PLAIN_EVERY

        def advance(done: int, detail: str = "", **fields: object) -> None:
            nonlocal last
            now = clock()
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
                    f"{label} {done}/{total} ({100 * done // max(total, 1)} %), {left:.0f} s left {detail}",
                    file=self._console.file,
                    flush=True,
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


def _plain(value: object, is_lines: bool = False) -> object:
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
