"""`adapter-convert`: adapters from one format to another, and a look into them."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from converters import architectures, experts, formats, inspection, report
from converters.adapter import WIRE_DTYPES
from converters.architectures import Base, check_fits
from converters.families import NotKnownHere
from converters.finite_check import watched
from converters.formats import AdapterFile
from oneround import command
from oneround.errors import BadAdapter, BadModel, UsageError

NAME = "adapter-convert"
_CODES = "Exit codes: 0 done, 2 usage, 5 something is wrong with the adapter or the base, 6 no room on the disk."
_NEXT = {
    "canonical": "adapter-convert {quoted} OUT --to peft",
    "peft": "in Python, peft.PeftModel.from_pretrained(base_model, {dst!r})",
    "mlx": "mlx_lm.generate --model {base} --adapter-path {quoted} --prompt Hello",
    "gguf": "llama-server -m BASE.gguf --lora {quoted}",
}
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)


class _Converting(TyperGroup):
    """Whatever does not name a command is a conversion: `adapter-convert SRC DST --to peft`.

    An adapter that is called `inspect` is `./inspect`.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [f"SRC DST --to {'|'.join(formats.NAMES)} [--base MODEL] [OPTIONS]\n       {NAME} inspect SRC"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help", "--install-completion", "--show-completion"}:
            args = ["convert", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    cls=_Converting,
    pretty_exceptions_enable=False,
    help="Convert LoRA adapters exactly: PEFT, mlx-lm, GGUF and oneround's common layout, in every direction."
    f"\n\nThe options of a conversion: {NAME} convert --help",
    epilog=f"Example: adapter-convert my-peft-adapter/ my-mlx-adapter/ --to mlx --base SmolLM2-135M/ · {_CODES}",
    no_args_is_help=True,
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
    dtype: Annotated[str, typer.Option(help=f"For canonical: {', '.join(WIRE_DTYPES)}.", show_default="float32")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter; the word `convert` may be left out."""
    _check_options(to, dtype)
    adapter_file = formats.recognise(src)
    if dst.resolve() in (adapter_file.path.resolve(), *adapter_file.path.resolve().parents):
        raise UsageError(f"{dst} holds what is to be converted", hint="give another DST")
    formats.check_place(dst, to, force=force)
    model = _described(base, base_gguf)
    update = formats.read(adapter_file, model)
    if model is not None:
        check_fits(model, {name: shape for name, shape in update.shapes.items() if not experts.is_expert(name)})
    ranks = sorted(set(update.ranks.values()))
    with _bar("writing") as progress, _placed(dst) as partial:
        done = itertools.count(1)
        looked_at = watched(update, dtype or "float32", lambda: progress(next(done), 2 * len(update.modules)))
        base_model = _base_model(adapter_file, base)
        formats.write(looked_at, partial, to, model, base_model=base_model, dtype=dtype or "float32")
    names = {"dst": str(dst), "quoted": shlex.quote(str(dst)), "base": shlex.quote(str(base or "BASE"))}
    summary = {
        "from": adapter_file.format,
        "to": to,
        "path": str(dst),
        "modules": len(update.modules),
        "ranks": ranks,
        "padded_to": ranks[-1] if to == "mlx" and len(ranks) > 1 else None,
        "bytes": inspection.size(dst),
        "next": _NEXT[to].format(**names),
    }
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        out.print(report.converted(summary), soft_wrap=True)


@app.command(epilog=f"Example: adapter-convert inspect my-adapter/ · {_CODES}")
def inspect(
    src: Annotated[Path, typer.Argument(help="A PEFT or mlx-lm folder, a .gguf adapter, or a .safetensors file.")],
    base: BaseFolder = None,
    base_gguf: BaseGguf = None,
    as_json: Json = False,
) -> None:
    """Print what is in an adapter (ranks, scalings, modules, norms per layer) and what is wrong with it."""
    adapter_file = formats.recognise(src)
    model = _described(base, base_gguf)
    with _bar("looking") as progress:
        inspected = inspection.inspect(adapter_file, model, progress)
    if as_json:
        print(json.dumps(inspected.as_json(), indent=2, allow_nan=False))
    else:
        out.print(report.inspected(inspected))
    if inspected.problems:
        sys.exit(BadAdapter.exit_code)


def _check_options(to: str, dtype: str) -> None:
    for name, value, accepted in (("--to", to, formats.NAMES), ("--dtype", dtype or "float32", tuple(WIRE_DTYPES))):
        if value not in accepted:
            raise UsageError(f"{name} is {value!r}; expected {', '.join(accepted)}")
    if dtype and to != "canonical":
        raise UsageError(f"--dtype is for canonical; {to} is written in float32", hint="leave --dtype out")


def _described(base: Path | None, base_gguf: Path | None) -> Base | None:
    if base is None:
        if base_gguf is not None:
            raise UsageError("--base-gguf goes with --base, the folder of the same model")
        return None
    try:
        return architectures.describe(base, base_gguf)
    except NotKnownHere as error:
        raise BadModel(f"{error}", hint=f"--base {base} --base-gguf MODEL.gguf, a GGUF of the same model") from error
    except BadModel as error:
        if not base.exists() and len(base.parts) == 2 and not base.is_absolute():
            raise BadModel(f"{error}", hint=f"hf download {base} --local-dir {base}") from error
        raise


def _base_model(adapter_file: AdapterFile, base: Path | None) -> str:
    """What PEFT's settings should name as the base: what was given, or what the source names."""
    source_settings = inspection.settings_of(adapter_file)
    return str(base or source_settings.get("base_model_name_or_path") or source_settings.get("model") or "")


@contextmanager
def _placed(dst: Path) -> Iterator[Path]:
    """A name beside `dst` to write under, which takes its place when the block ends well, and else is gone."""
    dst = dst if dst.name else dst.resolve()  # `.` has no name to put things beside
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial, old = dst.with_name(f".{dst.name}.converting"), dst.with_name(f".{dst.name}.replaced")
    _remove(partial)
    try:
        yield partial
        if dst.is_dir():  # a folder cannot be renamed over another; the old one goes when the new one is there
            _remove(old)
            dst.replace(old)
        partial.replace(dst)
        _remove(old)
    finally:
        if old.exists() and not dst.exists():
            old.replace(dst)
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
