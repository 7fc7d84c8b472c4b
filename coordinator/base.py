"""The base model of a job: found, described, and turned into a GGUF once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters import architectures, gguf_base, gguf_file, gguf_merge
from converters.architectures import Base
from converters.errors import BadModel
from coordinator import job as jobs
from oneround import stream
from oneround.v1 import federation_pb2 as pb

# Everything that training or conversion reads; never pickles, never code.
_WANTED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class Prepared:
    """A base that is on this machine."""

    folder: Path
    base: Base
    files: list[pb.Artifact]
    fingerprint: str
    revision: str  # commit of a hub model; empty for a folder


def prepare(spec: pb.ModelSpec) -> Prepared:
    """Find the base, from a folder or the hub, and fingerprint its files.

    Raises:
        BadModel: it is not there, or of a family that is not supported.
    """
    folder, revision = _find(spec)
    described = architectures.describe(folder)
    files = [
        pb.Artifact(name=file.relative_to(folder).as_posix(), digest=stream.digest(file), size=file.stat().st_size)
        for file in architectures.model_files(folder)
    ]
    return Prepared(folder, described, files, stream.fingerprint(files), revision)


def gguf(spec: pb.ModelSpec, prepared: Prepared, cache: Path) -> Path:
    """The base as GGUF: the operator's own, or built once from the folder and kept in `cache`.

    Raises:
        BadModel: the operator's own is not there, is quantised, or is of another model.
    """
    if spec.gguf:
        given = Path(spec.gguf)
        _same_model(given, prepared)
        return given
    built = cache / f"{prepared.fingerprint}.gguf"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        gguf_base.build(prepared.folder, built)
    return built


def _same_model(given: Path, prepared: Prepared) -> None:
    """Everybody would train for nothing if this came out at publication: sizes, and the last norm, which is small and
    which no two trainings share, have to agree now."""
    source = gguf_merge.check_base(given, prepared.base, prepared.base.linears)
    norm = source.tensors.get(architectures.gguf_name(prepared.base, "model.norm.weight"))
    expected = architectures.weights(prepared.folder).get("model.norm.weight")
    if norm is None or expected is None:
        raise BadModel(f"{given} or {prepared.folder} has no final norm to compare them by")
    if not np.allclose(gguf_file.to_float32(norm), expected.astype(np.float32), rtol=1e-2, atol=1e-3):
        raise BadModel(f"{given} holds other weights than {prepared.folder}", hint="leave model.gguf out: it is built")


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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        found = Path(snapshot_download(spec.base, revision=spec.revision, allow_patterns=list(_WANTED)))
    except RepositoryNotFoundError as error:
        raise BadModel(
            f"the Hugging Face hub has no model {spec.base}", hint="hf auth login, if it is gated"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadModel(
            f"the base model {spec.base} is neither a folder here nor to be had from the hub: {error}",
            hint=f"hf download {spec.base}, on a machine with a network, and give the folder as model.base",
        ) from error
    return found, found.name
