"""What the settings of a base model may not ask of the libraries that read them: to run a program of the model's own,
to fetch one, or to open files elsewhere.

`trust_remote_code` is off wherever we load a model. These are the other ways, looked for by name before any library
sees the folder, since which of them a library follows differs from version to version.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters import settings
from oneround.errors import BadModel

_COPY = "a copy of the model without this key can be a job's base, if it works without"
_REFUSED = {
    "model_file": "mlx-lm would run that file",  # mlx_lm.utils.load_model
    "transformers_weights": "transformers would take the weights from there, a pickle too",
    "quantization_config": "the weights are quantised, and are read by other packages' own loaders",
    "custom_generate": "transformers would run a program for generation",
}
_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_OWN_ATTENTION = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")  # anything else may be fetched
# Notes of whoever saved the tokenizer, which transformers does not open.
_NOTES = ("special_tokens_map_file", "added_tokens_file", "chat_template_file", "tokenizer_config_file")


def check(folder: Path) -> None:
    """Hold the settings in a model's folder against what they may not ask for.

    Raises:
        BadModel: they do, by the file's and the key's name; or a file of settings is not sound.
    """
    for name in ("config.json", "generation_config.json"):
        for key, value in _keys(_read(folder / name)):
            if value is not None and key in _REFUSED:
                raise BadModel(f"{folder / name} has {key}: {_REFUSED[key]}, and nothing of that is done", hint=_COPY)
            if key in _ATTENTION and _chosen(value) - set(_OWN_ATTENTION):
                chosen = ", ".join(sorted(_chosen(value)))[:80]
                raise BadModel(
                    f"{folder / name} asks by {key} for {chosen!r}, a program from elsewhere, and none is fetched",
                    hint=_COPY,
                )
    tokenizer = _read(folder / "tokenizer_config.json")
    for key, value in tokenizer.items():
        elsewhere = key.endswith("_file") and key not in _NOTES
        if value and (elsewhere or key == "init_inputs" or (key == "fast_tokenizer_files" and not _are_bare(value))):
            raise BadModel(
                f"{folder / 'tokenizer_config.json'} names files by {key[:80]}; its files are those beside it",
                hint=_COPY,
            )


def named(folder: Path) -> str:
    """The file of settings that names code of the model's own (`auto_map`), which is not run; empty if none does.

    Many such models are known to the libraries too and need it no more, so this alone is no reason to refuse one.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if any(key == "auto_map" and value for key, value in _keys(_read(folder / name))):
            return name
    return ""


def hint(folder: Path) -> str:
    """What to say where a library does not load a model, when that may be for want of its own code."""
    file = named(folder)
    return f"{file} names code of the model's own (auto_map), and oneround runs none: take another base" if file else ""


def _read(file: Path) -> dict[str, Any]:
    return dict(settings.read(file, BadModel).values) if file.is_file() else {}


def _keys(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key at any depth: a part of a model has settings of its own."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _chosen(value: Any) -> set[str]:
    """Implementations that are asked for: one, or one for each part."""
    return {str(name) for name in (value.values() if isinstance(value, dict) else [value]) if name is not None}


def _are_bare(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
