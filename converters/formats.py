"""The formats that an adapter may be in, told by what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from converters import adapter, gguf_adapter, mlx, peft
from converters.adapter import Adapter
from converters.architectures import Base
from converters.errors import BadData, UsageError

NAMES = ("canonical", "peft", "mlx", "gguf")
_FOLDERS = {
    "peft": ("adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"),
    "mlx": ("adapters.safetensors",),
}


class Found(NamedTuple):
    """An adapter's format, and the file or folder that it is."""

    format: str
    path: Path


def recognise(path: Path) -> Found:
    """Tell a format by what is there; a file of a PEFT or mlx-lm folder stands for the folder.

    Raises:
        BadData: nothing is there, or nothing that is known.
    """
    if not path.exists():
        raise BadData(f"{path} is not there")
    folder = path if path.is_dir() else path.parent
    for name, files in _FOLDERS.items():
        if any((folder / file).is_file() for file in files) and (
            path.is_dir() or path.name in (*files, "adapter_config.json")
        ):
            return Found(name, folder)
    if path.is_file() and path.suffix == ".gguf":
        return Found("gguf", path)
    if path.is_file() and path.suffix == ".safetensors":
        return Found("canonical", path)
    raise BadData(
        f"{path} is no adapter in a format that is known",
        hint="a folder with adapter_model.safetensors (PEFT) or adapters.safetensors (mlx-lm), a .gguf file, or a"
        " .safetensors file in the common layout",
    )


def read(found: Found, base: Base | None) -> Adapter:
    """Read an adapter of a recognised format.

    Raises:
        UsageError: the format needs the base model to be read.
        BadData: it is not sound, or cannot be converted.
    """
    readers: dict[str, Callable[[], Adapter]] = {
        "canonical": lambda: adapter.read(found.path),
        "peft": lambda: peft.read(found.path),
        "mlx": lambda: mlx.read(found.path),
        "gguf": lambda: gguf_adapter.read(found.path, _needed(base, "read", "gguf")),
    }
    return readers[found.format]()


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
