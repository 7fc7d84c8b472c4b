"""What a job's training starts from: its base model and its initial adapter, from this machine or the coordinator."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from converters import adapter
from converters.adapter import Adapter, Shape
from edge_client import outbox
from edge_client.connection import retry
from edge_client.connection.remote import Remote, local_path
from edge_client.outbox import Outbox
from edge_client.ui.screen import Screen
from oneround import stream
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb


async def fetch_base(remote: Remote, job: pb.Job, state: Path, model: Path | None, screen: Screen) -> Path:
    """The folder of the job's base model: the person's own if it is the same, or fetched from the coordinator.

    Raises:
        BadData: the person's own differs from the job's.
    """
    if model is not None:
        await _require_same(model, job)
        return model
    folder = outbox.model_folder(state, job)
    base_files = [(local_path(folder, artifact), artifact) for artifact in job.base_files]
    missing = [(file, artifact) for file, artifact in base_files if not file.is_file()]
    if missing:
        with screen.bar("base", sum(artifact.size for _, artifact in missing)) as advance:
            before = 0

            def on_bytes(done: int) -> None:
                advance(before + done)

            for file, artifact in missing:
                fetch = partial(remote.download, job.spec.name, artifact, file)
                await retry.through(remote, job.deadline_unix, screen, fetch, on_bytes)
                before += artifact.size
    return folder


async def _require_same(model: Path, job: pb.Job) -> None:
    for artifact in job.base_files:
        file = local_path(model, artifact)
        if not file.is_file() or await asyncio.to_thread(stream.digest, file) != artifact.digest:
            raise BadData(
                f"{model} is not the job's base model: {artifact.name} is missing or differs",
                hint="leave --model out, and the coordinator sends the base",
            )


async def fetch_initial(remote: Remote, job: pb.Job, box: Outbox, screen: Screen) -> Adapter:
    """The adapter that training begins with.

    Raises:
        BadData: it is not of the rank or the modules that the job announces.
    """
    if not box.initial.exists():
        with screen.bar("adapter", job.initial.size) as advance:
            fetch = partial(remote.download, job.spec.name, job.initial, box.initial)
            await retry.through(remote, job.deadline_unix, screen, fetch, advance)
    initial = adapter.read(box.initial)
    if set(initial.ranks.values()) != {job.spec.lora.rank}:
        raise BadData(f"the coordinator's initial adapter is not of rank {job.spec.lora.rank}, as its job says")
    adapter.check(initial, {module.name: Shape(module.out_features, module.in_features) for module in job.modules})
    return initial
