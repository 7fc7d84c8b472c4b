"""The files of a Hugging Face folder: which there are, and the tensors in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from converters import settings, tensors
from converters.settings import Settings
from converters.tensors import Array
from oneround.errors import BadAdapter, BadModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

# What a client needs beside the weights; never pickles, never code.
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def config(folder: Path) -> Settings:
    """The folder's config.json.

    Raises:
        BadModel: no such folder, or no such file in it.
    """
    return settings.read(_folder(folder) / "config.json", BadModel)


def weights(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder's safetensors files by name, mapped and not read.

    Raises:
        BadModel: files are missing or not sound, or do not agree with the index.
    """
    arrays: dict[str, Array] = {}
    for file in _weight_files(folder):
        for name, tensor in tensors.read(file)[0].items():
            if name in arrays:
                raise BadModel(f"{folder}: two files hold the tensor {name}")
            arrays[name] = tensor
    return arrays


def dtype(folder: Path, name: str, tensor: Array) -> str:
    """A matrix's type as GGUF's file types are named: f32, f16 or bf16.

    Raises:
        BadModel: it is none of these.
    """
    if tensor.dtype.name not in _DTYPES:
        raise BadModel(f"{folder}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    return _DTYPES[tensor.dtype.name]


def model_files(folder: Path) -> list[Path]:
    """The files that a client needs to train from this folder, sorted by name.

    Raises:
        BadModel: the weights are missing.
    """
    files = [_folder(folder) / name for name in _FILES]
    if not (folder / _SINGLE).is_file():
        files.append(folder / _INDEX)
    return sorted([file for file in files if file.is_file()] + _weight_files(folder))


def is_model_file(name: str) -> bool:
    """Whether a file of this name can be one that a client needs: settings, a tokenizer, or weights in safetensors."""
    return name in (*_FILES, _INDEX) or (name.endswith(".safetensors") and "/" not in name)


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadModel(f"the base model {folder} is not a folder")
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """One file, or those that the index names; the order of preference is transformers'."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise BadModel(
            f"{folder} has no weights in safetensors form, neither {_SINGLE} nor {_INDEX}",
            hint="pickled checkpoints (.bin, .pt) can run code and are not read; save the model as safetensors",
        )
    return parts(folder / _INDEX, BadModel)


def parts(index: Path, wrong: type[BadModel] | type[BadAdapter]) -> list[Path]:
    """The safetensors files beside an index that it names, sorted.

    Raises:
        BadModel or BadAdapter, as asked: the index is not sound, or a file is missing.
    """
    listed = settings.read(index, wrong)
    names = set()
    for part in listed.table("weight_map").values.values():
        if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
            raise listed.bad(f"{part!r} is not the name of a safetensors file beside it")
        names.add(part)
    missing = sorted(name for name in names if not index.with_name(name).is_file())
    if missing or not names:
        shown = ", ".join(missing[:3])
        raise wrong(f"{index.parent}: {len(missing)} of {len(names)} weight files are missing: {shown}")
    return [index.with_name(name) for name in sorted(names)]


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of the tokenizer's file, in hex; empty where there is none."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def chat_template_digest(folder: Path) -> str:
    """SHA-256 of the chat template, in hex, in whichever file it is; empty where there is none. In transformers' order:
    chat_template.jinja, chat_template.json, tokenizer_config.json."""
    template: object = None
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template is None and (folder / name).is_file():
            template = json.loads((folder / name).read_text("utf-8")).get("chat_template")
    if not template:
        return ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
