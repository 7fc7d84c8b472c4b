"""The operator's commands talking to the daemon that runs over a state folder on this machine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.auth import identity
from coordinator.rpc import transport
from oneround import files
from oneround.errors import OneroundError, Unreachable, from_status
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

Reply = TypeVar("Reply", bound=Message)

_TIMEOUT = 60.0  # seconds; a submission has none, since it may fetch, fingerprint and convert a large base


@dataclass(frozen=True)
class DaemonAddress:
    """HOST:PORT, whether there is no TLS, and the fingerprint of the key that clients see."""

    address: str
    insecure: bool
    fingerprint: str = ""


def announce(state: Path, address: str, *, insecure: bool, fingerprint: str = "") -> None:
    """Leave word of where the daemon listens."""
    left = DaemonAddress(address, insecure, "" if insecure else fingerprint)
    files.replace(state / "daemon.json", [json.dumps(asdict(left)).encode()])


def listening(state: Path) -> DaemonAddress:
    """Where the daemon over a state folder listens, or did the last time.

    Raises:
        Unreachable: none ever did.
    """
    try:
        return DaemonAddress(**json.loads((state / "daemon.json").read_text()))
    except FileNotFoundError:
        raise Unreachable(f"no coordinator has run over {state}", hint=f"coordinator serve --state {state}") from None


@asynccontextmanager
async def channel(state: Path) -> AsyncIterator[tuple[grpc.aio.Channel, list[tuple[str, str]]]]:
    """A channel to the daemon, and the metadata that proves that we may administer it."""
    daemon = listening(state)
    async with grpc.aio.insecure_channel(transport.socket(state)) as opened:  # which never leaves this machine
        try:
            yield opened, [("authorization", f"Bearer {identity.admin_token(state)}")]
        except grpc.aio.AioRpcError as error:
            raise _readable(error, daemon.address, state) from error


async def submit(state: Path, spec: pb.JobSpec) -> pb.JobStatus:
    return await _ask(state, pb.SubmitRequest(spec=spec), pb.JobStatus, seconds=None)


async def show(state: Path, name: str) -> pb.JobStatus:
    return await _ask(state, pb.ShowRequest(job=name), pb.JobStatus)


async def close(state: Path, name: str) -> pb.JobStatus:
    return await _ask(state, pb.CloseRequest(job=name), pb.JobStatus)


async def cancel(state: Path, name: str) -> pb.JobStatus:
    return await _ask(state, pb.CancelRequest(job=name), pb.JobStatus)


async def delete(state: Path, name: str) -> None:
    await _ask(state, pb.DeleteRequest(job=name), pb.DeleteReply)


async def publish(state: Path, request: pb.PublishRequest) -> pb.JobStatus:
    return await _ask(state, request, pb.JobStatus)


async def judge(state: Path, request: pb.JudgeRequest) -> pb.JobStatus:
    return await _ask(state, request, pb.JobStatus)


async def create_token(state: Path, request: pb.CreateTokenRequest) -> pb.CreateTokenReply:
    return await _ask(state, request, pb.CreateTokenReply)


async def tokens(state: Path) -> pb.ListTokensReply:
    return await _ask(state, pb.ListTokensRequest(), pb.ListTokensReply)


async def revoke_token(state: Path, id: str) -> pb.Token:
    return await _ask(state, pb.RevokeTokenRequest(id=id), pb.Token)


async def clients(state: Path, job: str) -> pb.ListClientsReply:
    return await _ask(state, pb.ListClientsRequest(job=job), pb.ListClientsReply)


async def settle(state: Path, request: pb.SettleRequest) -> pb.KnownClient:
    return await _ask(state, request, pb.KnownClient)


async def _ask(state: Path, request: Message, kind: type[Reply], *, seconds: float | None = _TIMEOUT) -> Reply:
    """Make the admin call that a request is named after, and give its reply, which is of this kind."""
    async with channel(state) as (opened, metadata):
        method = getattr(rpc.AdminStub(opened), request.DESCRIPTOR.name.removesuffix("Request"))
        reply = await method(request, metadata=metadata, timeout=seconds)
        assert isinstance(reply, kind), "the proto says so"
        return reply


async def healthy(state: Path) -> bool:
    """Whether the daemon answers its health check, and serves."""
    async with channel(state) as (opened, _):
        check = health_pb2_grpc.HealthStub(opened).Check
        reply = await check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def jobs(state: Path) -> list[pb.JobStatus]:
    async with channel(state) as (opened, metadata):
        reply = await rpc.FederationStub(opened).ListJobs(pb.ListJobsRequest(), metadata=metadata, timeout=_TIMEOUT)
        return list(reply.jobs)


def _readable(error: grpc.aio.AioRpcError, address: str, state: Path) -> OneroundError:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Unreachable(f"no coordinator answers at {address}", hint=f"coordinator serve --state {state}")
    hint: Any = dict(error.trailing_metadata() or ()).get("hint-bin", b"")
    return from_status(error.code().name, error.details() or "", hint.decode())
