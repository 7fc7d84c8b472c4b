"""Whether an uploaded adapter may take part. Bytes from a stranger: nothing is taken on trust."""

from __future__ import annotations

from pathlib import Path

from converters import adapter
from converters.adapter import Shape
from converters.errors import BadData
from oneround.v1 import federation_pb2 as pb


def verdict(file: Path, declaration: pb.Declaration, job: pb.Job) -> str:
    """Why this contribution is quarantined; empty when it is admitted."""
    try:
        uploaded = adapter.read(file)
        adapter.check(uploaded, {module.name: Shape(module.out_features, module.in_features) for module in job.modules})
    except BadData as error:
        return str(error).replace(str(file), "the upload")
    for name, rank in uploaded.ranks.items():
        if rank != job.spec.lora.rank:
            return f"{name} has rank {rank}, the job asks for {job.spec.lora.rank}"
    base = uploaded.metadata.get("base")
    if base != job.base_fingerprint:
        return f"trained over base {base}, the job's base is {job.base_fingerprint}"
    if declaration.num_examples < 1:
        return "it declares no training examples"
    return ""
