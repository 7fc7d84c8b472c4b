"""How a coordinator answers a client that means harm."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import StatusCode

from oneround.v1 import federation_pb2 as pb

MALLORY = "e" * 32


EVALUATION = pb.Evaluation(version=1, base_loss=3.0, own_loss=2.5, published_loss=2.4, tokens=1000)


async def status_of(call: Any) -> tuple[StatusCode, str]:
    """How a call ends; of a stream, after all that it gives."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return StatusCode.OK, ""


async def refused(call: Any, code: StatusCode, says: str = "") -> None:
    found, details = await status_of(call)
    assert found == code and says in details, (found, details)
    assert len(details) < 1000 and all(letter.isprintable() for letter in details), "fit for a terminal and a log"
