"""The base model of a job: found, described, and turned into a GGUF once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters import architectures, custom_code, other_families
from converters.architectures import Base
from converters.gguf import base as gguf_base
from converters.gguf import file as gguf_file
from converters.gguf import merge as gguf_merge
from coordinator.jobs import spec as jobs
from oneround import stream
from oneround.errors import BadModel
from oneround.v1 import federation_pb2 as pb

# Everything that training or conversion reads; never pickles, never code.
_WANTED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class PreparedBase:
    """A base that is on this machine."""

    folder: Path
    base: Base
    files: list[pb.Artifact]
    fingerprint: str
    revision: str  # commit of a hub model; empty for a folder


def prepare(spec: pb.ModelSpec, cache: Path) -> PreparedBase:
    """Find the base, from a folder or the hub, and fingerprint its files.

    Raises:
        BadModel: it is not there, or of a family for which there is no way to a GGUF.
    """
    folder, revision = _find(spec)
    custom_code.check(folder)
    if not spec.gguf and not architectures.is_known(folder):
        other_families.require_script(folder)  # before large files are read
    files = [
        pb.Artifact(name=file.relative_to(folder).as_posix(), digest=stream.digest(file), size=file.stat().st_size)
        for file in architectures.model_files(folder)
    ]
    for file in files:
        if not stream.is_name(file.name):
            raise BadModel(
                f"{folder} has a file {file.name!r}, a name that not every client's disk takes",
                hint="name the parts of the weights as transformers does: model-00001-of-00002.safetensors",
            )
    fingerprint = stream.fingerprint(files)
    return PreparedBase(folder, describe(spec, folder, fingerprint, cache), files, fingerprint, revision)


def describe(spec: pb.ModelSpec, folder: Path, fingerprint: str, cache: Path) -> Base:
    """The base; a family that is not known is described by its GGUF, which is made first if the operator gives none.

    Raises:
        BadModel: the folder or the GGUF is not sound, or there is no way to a GGUF.
    """
    if architectures.is_known(folder):
        return architectures.describe(folder)
    return architectures.describe(folder, Path(spec.gguf) if spec.gguf else _built(folder, fingerprint, cache))


def gguf(spec: pb.ModelSpec, prepared: PreparedBase, cache: Path) -> Path:
    """The base as GGUF: the operator's own, or built once from the folder and kept in `cache`.

    Raises:
        BadModel: the operator's own is not there, is quantised, or is of another model.
    """
    if spec.gguf:
        file = Path(spec.gguf)
        _same_model(file, prepared, spec.accept_quantised_gguf)
        return file
    return _built(prepared.folder, prepared.fingerprint, cache)


def _built(folder: Path, fingerprint: str, cache: Path) -> Path:
    built = cache / f"{fingerprint}.gguf"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        gguf_base.build(folder, built)
    return built


def _same_model(file: Path, prepared: PreparedBase, accept_quantised: bool) -> None:
    """Everybody would train for nothing if this came out at publication: sizes, and the last norm, which is small and
    which no two trainings share, have to agree now."""
    base = prepared.base
    source = gguf_merge.check_base(file, base, base.linears, accept_quantised=accept_quantised)
    norm, name = source.tensors.get("output_norm.weight"), f"{base.family.norm}.weight"
    expected = architectures.weights(prepared.folder).get(name)
    if norm is None or expected is None:
        if architectures.is_known(prepared.folder):
            raise BadModel(f"{file} or {prepared.folder} has no final norm to compare them by")
        return  # some families have none; then the first block's matrices were compared
    stored, ours = gguf_file.to_float32(norm), architectures.as_in_gguf(base, name, expected).astype(np.float32)
    if stored.shape != ours.shape or not np.allclose(stored, ours, rtol=1e-2, atol=1e-3):
        raise BadModel(f"{file} holds other weights than {prepared.folder}", hint="leave model.gguf out: it is built")


def _find(spec: pb.ModelSpec) -> tuple[Path, str]:
    local = Path(spec.base).expanduser()
    if local.is_dir():
        return local.resolve(), ""
    if jobs.is_path(spec.base):
        raise BadModel(
            f"the base model {spec.base} is not there",
            hint="model.base takes a folder on the coordinator's machine, or a Hugging Face hub id such as org/name",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(spec.base, revision=spec.revision, allow_patterns=list(_WANTED)))
    except RepositoryNotFoundError as error:
        raise BadModel(
            f"the Hugging Face hub has no model {spec.base}", hint="hf auth login, if it is gated"
        ) from error
    except HFValidationError as error:
        raise BadModel(f"{spec.base} is neither a folder on this machine nor a Hugging Face hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadModel(
            f"the base model {spec.base} is no folder here, and cannot be downloaded from the hub: {error}",
            hint=f"hf download {spec.base}, on a machine with a network, and give the folder as model.base",
        ) from error
    return folder, folder.name
