"""`adapter-convert`: adapters from one format to another, and a look into them."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from converters import architectures, command, formats, inspection, report
from converters.adapter import WIRE_DTYPES, Adapter
from converters.architectures import Base, check_fits
from converters.errors import BadAdapter, UsageError
from converters.formats import Found

NAME = "adapter-convert"
_CODES = "Exit codes: 0 done, 2 usage, 5 something is wrong with the adapter or the base, 6 no room on the disk."
_NEXT = {
    "canonical": "adapter-convert {dst} OUT --to peft",
    "peft": "python -c 'from peft import AutoPeftModelForCausalLM as M; M.from_pretrained(\"{dst}\")'",
    "mlx": "mlx_lm.generate --model {base} --adapter-path {dst} --prompt Hello",
    "gguf": "llama-server -m BASE.gguf --lora {dst}",
}
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)


class _Converting(TyperGroup):
    """Whatever does not name a command is a conversion: `adapter-convert SRC DST --to peft`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["convert", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    cls=_Converting,
    pretty_exceptions_enable=False,
    help="Convert LoRA adapters exactly: PEFT, mlx-lm, GGUF and oneround's common layout, in every direction.\n\n"
    "adapter-convert SRC DST --to canonical|peft|mlx|gguf [--base MODEL]",
    epilog=f"Example: adapter-convert my-peft-adapter/ my-mlx-adapter/ --to mlx --base SmolLM2-135M/ · {_CODES}",
    no_args_is_help=True,
    add_completion=False,
)
BaseFolder = Annotated[
    Path | None,
    typer.Option("--base", help="The base model's Hugging Face folder: to write mlx, and to read or write gguf."),
]
BaseGguf = Annotated[
    Path | None,
    typer.Option("--base-gguf", help="The base as GGUF too, where its family is not known here."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]


@app.command(epilog=f"Example: adapter-convert adapters/ adapter.gguf --to gguf --base SmolLM2-135M/ · {_CODES}")
def convert(
    src: Annotated[Path, typer.Argument(help="A PEFT or mlx-lm folder, a .gguf adapter, or a .safetensors file.")],
    dst: Annotated[Path, typer.Argument(help="The folder (peft, mlx) or file (gguf, canonical) to write.")],
    to: Annotated[str, typer.Option("--to", help=f"The format to write: {', '.join(formats.NAMES)}.")],
    base: BaseFolder = None,
    base_gguf: BaseGguf = None,
    dtype: Annotated[str, typer.Option(help=f"For canonical: {', '.join(WIRE_DTYPES)}.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter; the word `convert` may be left out."""
    for name, value, known in (("--to", to, formats.NAMES), ("--dtype", dtype, tuple(WIRE_DTYPES))):
        if value not in known:
            raise UsageError(f"{name} is {value!r}; expected {', '.join(known)}")
    found = formats.recognise(src)
    if dst.exists() and not force:
        raise UsageError(f"{dst} is there already", hint="--force replaces it")
    if dst.resolve() in (found.path.resolve(), *found.path.resolve().parents):
        raise UsageError(f"{dst} holds what is to be converted", hint="give another DST")
    model = _described(base, base_gguf)
    update = formats.read(found, model)
    if model is not None:
        check_fits(model, update.shapes)
    with _placed(dst) as partial, _watched(partial, update):
        formats.write(update, partial, to, model, base_model=_base_model(found, base), dtype=dtype)
    said = {
        "from": found.format, "to": to, "path": str(dst), "modules": len(update.modules),
        "ranks": sorted(set(update.ranks.values())), "bytes": inspection.size(dst),
        "next": _NEXT[to].format(dst=dst, base=base or "BASE"),
    }  # fmt: skip
    if as_json:
        print(json.dumps(said, indent=2))
    else:
        out.print(report.converted(said), soft_wrap=True)


@app.command(epilog=f"Example: adapter-convert inspect my-adapter/ · {_CODES}")
def inspect(
    src: Annotated[Path, typer.Argument(help="A PEFT or mlx-lm folder, a .gguf adapter, or a .safetensors file.")],
    base: BaseFolder = None,
    base_gguf: BaseGguf = None,
    as_json: Json = False,
) -> None:
    """Print what is in an adapter (ranks, scalings, modules, norms per layer) and what is wrong with it."""
    found = formats.recognise(src)
    model = _described(base, base_gguf)
    with _bar("looking") as progress:
        said = inspection.inspect(found, model, progress)
    if as_json:
        print(json.dumps(said.as_json(), indent=2))
    else:
        out.print(report.inspected(said))
    if said.problems:
        sys.exit(BadAdapter.exit_code)


def _described(base: Path | None, base_gguf: Path | None) -> Base | None:
    return None if base is None else architectures.describe(base, base_gguf)


def _base_model(found: Found, base: Path | None) -> str:
    """What PEFT's settings should name as the base: what was given, or what the source names."""
    if base is not None:
        return str(base)
    known = inspection.settings_of(found)
    return str(known.get("base_model_name_or_path") or known.get("model") or "")


@contextmanager
def _placed(dst: Path) -> Iterator[Path]:
    """A name beside `dst` to write under, which takes its place when the block ends well, and else is gone."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.with_name(f".{dst.name}.converting")
    _remove(partial)
    try:
        yield partial
        if dst.exists() and (dst.is_dir() or partial.is_dir()):
            _remove(dst)
        partial.replace(dst)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _watched(partial: Path, update: Adapter) -> Iterator[None]:
    """A bar over the bytes that are written."""
    total = sum(4 * rank * sum(update.shapes[name]) for name, rank in update.ranks.items())
    done = threading.Event()
    with _bar("writing") as progress:

        def look() -> None:
            while not done.wait(0.2):
                beside = partial.with_name(f".{partial.name}.partial")
                progress(min(inspection.size(partial) + inspection.size(beside), total), total)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@contextmanager
def _bar(label: str) -> Iterator[inspection.OnProgress]:
    """A progress bar on a terminal, and none elsewhere; gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main() -> None:
    command.run(app, NAME)
