"""The calls of the operator's commands; each proves that it may."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import structlog

from coordinator.auth.gate import Gate
from coordinator.daemon import Daemon
from coordinator.rpc.status import Context, answered
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

log = structlog.get_logger()


class Admin(rpc.AdminServicer):
    """What the operator calls."""

    def __init__(self, daemon: Daemon, gate: Gate) -> None:
        self._operator, self._gate = daemon.operator, gate

    @asynccontextmanager
    async def _authorised(self, context: Context, method: str, request: object) -> AsyncIterator[None]:
        authorization = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not self._gate.is_operator(str(authorization)):
            log.warning("admin_refused", method=method, peer=context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this call needs the coordinator's admin token")
        async with answered(context, method, request):
            yield

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Submit", request):
            return await self._operator.submit(request.spec)

    async def Show(self, request: pb.ShowRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Show", request):
            return await self._operator.status(request.job)

    async def Close(self, request: pb.CloseRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Close", request):
            return await self._operator.close(request.job)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Cancel", request):
            return await self._operator.cancel(request.job)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteReply:
        async with self._authorised(context, "Delete", request):
            await self._operator.delete(request.job)
            return pb.DeleteReply()

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Publish", request):
            return await self._operator.publish(request)

    async def Judge(self, request: pb.JudgeRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Judge", request):
            return await self._operator.judge(request)

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenReply:
        async with self._authorised(context, "CreateToken", request):
            return await self._gate.create_token(request)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensReply:
        async with self._authorised(context, "ListTokens", request):
            return await self._gate.list_tokens()

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.Token:
        async with self._authorised(context, "RevokeToken", request):
            return await self._gate.revoke_token(request.id)

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsReply:
        async with self._authorised(context, "ListClients", request):
            return await self._gate.list_clients(request.job)

    async def Settle(self, request: pb.SettleRequest, context: Context) -> pb.KnownClient:
        async with self._authorised(context, "Settle", request):
            return await self._gate.settle(request)
