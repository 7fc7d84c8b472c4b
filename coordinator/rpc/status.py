"""Errors to gRPC statuses, in one place."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog

from coordinator import metrics
from oneround.errors import OneroundError, UsageError

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]

_FAULT = "a fault in the coordinator; its log has the details"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE)  # the operator's to mend, not ours


@asynccontextmanager
async def answered(context: Context, method: str, request: object) -> AsyncIterator[None]:
    """Turn our errors into statuses; anything else is our fault, logged, and INTERNAL. A request of None is one whose
    bytes were no message."""
    with metrics.timed(method) as call:
        try:
            if request is None:
                raise UsageError("these bytes are not a message of this protocol")
            yield
        except OneroundError as error:
            call.status, message = error.status, _short(str(error))
            log.info("refused", method=method, status=error.status, reason=message, peer=context.peer())
            trailing = (("hint-bin", _short(error.hint).encode()),) if error.hint else ()
            await context.abort(grpc.StatusCode[error.status], message, trailing_metadata=trailing)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                await _fault(context, call, method)
            call.status = "RESOURCE_EXHAUSTED"
            log.error("disk", method=method, reason=str(error))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the coordinator cannot write: {error.strerror}")
        except (grpc.aio.AbortError, asyncio.CancelledError):
            call.status = "CANCELLED"
            raise
        except Exception as error:
            if context.cancelled() or isinstance(error, grpc.aio.BaseError | grpc.aio.UsageError):
                call.status = "CANCELLED"  # the client went away
                raise
            await _fault(context, call, method)


async def _fault(context: Context, call: metrics.Call, method: str) -> None:
    call.status = "INTERNAL"
    log.exception("fault", method=method)
    await context.abort(grpc.StatusCode.INTERNAL, _FAULT)


def _short(text: str) -> str:
    """What fits into a status: errors quote what a peer said, and gRPC drops trailers over 8 KiB."""
    return text if len(text) <= 500 else f"{text[:500]} …"
