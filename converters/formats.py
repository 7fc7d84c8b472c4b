"""The formats that an adapter may be in, told by what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from converters import adapter, mlx, peft
from converters.adapter import Adapter
from converters.architectures import Base
from converters.gguf import adapter as gguf_adapter
from oneround.errors import BadData, UsageError

NAMES = ("canonical", "peft", "mlx", "gguf")
_SETTINGS = "adapter_config.json"
_FOLDERS = {
    "peft": ("adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"),
    "mlx": ("adapters.safetensors",),
}
_FILES = {"canonical": ".safetensors", "gguf": ".gguf"}
_WRITTEN = {_SETTINGS, "adapter_model.safetensors", "adapters.safetensors"}  # in folders


class AdapterFile(NamedTuple):
    """An adapter's format, and the file or folder that it is."""

    format: str
    path: Path


def recognise(path: Path) -> AdapterFile:
    """Tell a format by what is there; a file of a PEFT or mlx-lm folder stands for the folder.

    Raises:
        BadData: nothing is there, or nothing that is known, or two adapters at once.
    """
    if not path.exists():
        raise BadData(f"{path} is not there")
    folder = path if path.is_dir() else path.parent
    present = {name: [file for file in files if (folder / file).is_file()] for name, files in _FOLDERS.items()}
    for name, files in present.items():
        if path.is_file() and path.name in files:
            return AdapterFile(name, folder)
    if path.is_dir() or path.name == _SETTINGS:
        match [name for name, files in present.items() if files]:
            case [name]:
                return AdapterFile(name, folder)
            case [_, *_]:
                raise BadData(
                    f"{folder} holds a PEFT adapter and an mlx-lm adapter, and one {_SETTINGS} for both",
                    hint=f"give one file: {' or '.join(str(folder / files[0]) for files in present.values())}",
                )
    elif (kind := _kind(path)) is not None:
        return AdapterFile(kind, path)
    raise BadData(
        f"{path} is no adapter in a format that is known",
        hint="a folder with adapter_model.safetensors (PEFT) or adapters.safetensors (mlx-lm), a .gguf file, or a"
        " .safetensors file in the common layout",
    )


def _kind(file: Path) -> str | None:
    """A lone file's format, by its first bytes or, since a damaged file is of its format still, by its name."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if start.startswith(b"GGUF") or file.suffix == ".gguf":
        return "gguf"
    # safetensors begin with eight bytes of length, then JSON
    return "canonical" if file.suffix == ".safetensors" or start[8:] == b"{" else None


def check_place(path: Path, to: str, *, force: bool) -> None:
    """Whether an adapter may be written here.

    Raises:
        UsageError: something is there and not to be replaced, or holds more than an adapter; or a file's name for a
            folder, or the other way round.
    """
    is_folder = to in _FOLDERS
    if path.suffix in _FILES.values() and path.suffix != _FILES.get(to):
        raise UsageError(
            f"{path} is the name of a {path.suffix} file; {to} is {_file_or_folder(to)}", hint="give another DST"
        )
    if not path.exists():
        return
    if path.is_dir() != is_folder:
        raise UsageError(f"{path} is a {'folder' if path.is_dir() else 'file'}; {to} is {_file_or_folder(to)}")
    if not force:
        raise UsageError(f"{path} is there already", hint="--force replaces it")
    if is_folder and (others := sorted(file.name for file in path.iterdir() if file.name not in _WRITTEN)):
        raise UsageError(f"{path} holds more than an adapter, {others[0]} for one, and is not replaced")


def _file_or_folder(to: str) -> str:
    return "a folder" if to in _FOLDERS else f"one file, {_FILES[to]}"


def read(adapter_file: AdapterFile, base: Base | None) -> Adapter:
    """Read an adapter of a recognised format.

    Raises:
        UsageError: the format needs the base model to be read.
        BadData: it is not sound, or cannot be converted.
    """
    readers: dict[str, Callable[[], Adapter]] = {
        "canonical": lambda: adapter.read(adapter_file.path),
        "peft": lambda: peft.read(adapter_file.path),
        "mlx": lambda: mlx.read(adapter_file.path),
        "gguf": lambda: gguf_adapter.read(adapter_file.path, _needed(base, "read", "gguf")),
    }
    return readers[adapter_file.format]()


def write(update: Adapter, path: Path, to: str, base: Base | None, *, base_model: str, dtype: str) -> None:
    """Write an adapter; `dtype` is for the common layout, `base_model` goes into PEFT's settings.

    Raises:
        UsageError: the format needs the base model to be written.
        LayoutMismatch: the adapter does not fit the base, or the format cannot hold it.
        NotEnough: the disk is full.
    """
    writers: dict[str, Callable[[], None]] = {
        "canonical": lambda: adapter.write(update, path, dtype),
        "peft": lambda: peft.write(update, path, base_model=base_model),
        "mlx": lambda: mlx.write(update, path, _needed(base, "write", "mlx")),
        "gguf": lambda: gguf_adapter.write(update, path, _needed(base, "write", "gguf")),
    }
    writers[to]()


def _needed(base: Base | None, verb: str, name: str) -> Base:
    if base is None:
        raise UsageError(
            f"to {verb} {name} the base model's folder is needed",
            hint=f"adapter-convert SRC DST --to {name} --base MODEL" if verb == "write" else "add --base MODEL",
        )
    return base
