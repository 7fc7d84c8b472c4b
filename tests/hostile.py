"""A coordinator that means harm: it speaks the protocol, and announces whatever a test wants it to."""

import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from converters import adapter, architectures
from coordinator.jobs import spec as job
from oneround import stream
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

BASE = Path(__file__).parents[1] / "benchmarks" / "base"
SPEC = {
    "name": "notes",
    "model": {"base": "org/model"},
    "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
    "train": {"epochs": 1, "batch_size": 2, "max_seq_len": 32},
}
DEADLINE = 4e9  # seconds since the Unix epoch


class Hostile(rpc.FederationServicer):
    """Announces `job`, gives out `files` by digest, and keeps what it is told of those who join."""

    def __init__(self, announced: pb.Job, files: Mapping[str, Path], status: pb.JobStatus | None = None) -> None:
        self.job, self.files, self.then = announced, files, announced  # `then`: what Join gives
        self.status = status or pb.JobStatus(
            spec=announced.spec, deadline_unix=DEADLINE, state=pb.STATE_OPEN, takes_contributions=True
        )
        self.joined: list[pb.JoinRequest] = []

    async def Challenge(self, request: Any, context: Any) -> pb.ChallengeReply:
        return pb.ChallengeReply(challenge=bytes(56))

    async def SignIn(self, request: Any, context: Any) -> pb.SignInReply:
        return pb.SignInReply(session="session", holds_seconds=3600)

    async def ListJobs(self, request: Any, context: Any) -> pb.ListJobsReply:
        return pb.ListJobsReply(jobs=[self.status])

    async def Describe(self, request: Any, context: Any) -> pb.Job:
        return self.job

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        self.joined.append(request)
        return pb.JoinReply(lease="lease", job=self.then)

    async def Heartbeat(self, request: Any, context: Any) -> pb.HeartbeatReply:
        return pb.HeartbeatReply(directive=pb.DIRECTIVE_CONTINUE)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[pb.JobStatus]:
        yield self.status

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        yield pb.Chunk(data=self.files[request.digest].read_bytes()[request.offset :][: stream.MAX_CHUNK_BYTES])


@asynccontextmanager
async def serving(hostile: Hostile) -> AsyncIterator[str]:
    """Its address; without TLS."""
    server = grpc.aio.server()
    rpc.add_FederationServicer_to_server(hostile, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def artifact(file: Path, name: str = "") -> pb.Artifact:
    return pb.Artifact(name=name or file.name, digest=stream.digest(file), size=file.stat().st_size)


def announced(scratch: Path, base: Path = BASE, names: tuple[str, ...] = ()) -> tuple[pb.Job, dict[str, Path]]:
    """A sound job over the files of a base (of these names, or those that a coordinator would announce), and its files
    by digest. Modules are those of our own base."""
    spec = job.parse(SPEC)
    shapes = architectures.adapted(architectures.describe(BASE), spec.lora.target_modules)
    initial = scratch / "initial.safetensors"
    adapter.write(adapter.initial(shapes, spec.lora.rank, 0), initial)
    listed = [base / name for name in names] or architectures.model_files(base)
    files = [artifact(file) for file in listed]
    made = pb.Job(
        spec=spec,
        modules=[pb.Module(name=name, out_features=s.out, in_features=s.into) for name, s in shapes.items()],
        initial=artifact(initial),
        base_files=files,
        base_fingerprint=stream.fingerprint(files),
        deadline_unix=DEADLINE,
        id="0123456789abcdef" * 2,
    )
    return made, {stream.digest(file): file for file in (initial, *listed)}


def base_with(folder: Path, name: str = "config.json", **keys: Any) -> Path:
    """A copy of our base with other keys in a file of settings, and without those that are None."""
    if not folder.exists():
        shutil.copytree(BASE, folder)
    said = {**json.loads((folder / name).read_text()), **keys}
    (folder / name).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder
