"""The gRPC servers: on one port for clients, on this machine's own socket for the operator too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.auth.gate import Gate
from coordinator.auth.identity import Identity
from coordinator.auth.sessions import Sessions
from coordinator.daemon import Daemon
from coordinator.rpc import transport
from coordinator.rpc.admin import Admin
from coordinator.rpc.federation import Federation
from oneround import stream
from oneround.errors import NotEnough, UsageError
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

_OPTIONS = [
    ("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 1),
    ("grpc.keepalive_time_ms", 30_000),  # find out that a laptop's lid was closed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_concurrent_streams", 64),  # of one connection
    ("grpc.max_metadata_size", 16 * 1024),
    # What waits on a stream for its turn is 4 KiB, not a window that grows with the link; see uploads/flow_control.py.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 * 1024),
    # A connection keeps what it last read into for as long as it is open: pieces of 8 KiB, but from 12 KiB on 64 KiB.
    ("grpc.experimental.tcp_max_read_buffer_size", 12 * 1024 - 1),
]
ACCEPTORS = 16


def create(
    daemon: Daemon,
    identity: Identity,
    listen: str,
    *,
    insecure: bool,
    healthy: health.aio.HealthServicer | None = None,
    reflect: bool = False,
    certificates: transport.Certificates | None = None,
) -> tuple[Server, str]:
    """A server that is not yet started, and the address that it is bound to.

    `healthy` answers health checks; with `reflect`, tools may ask for the services. `certificates` says what is shown
    to whom, if it is not just the identity's to all. The operator's calls are taken on this machine's own socket alone.

    Raises:
        UsageError: the address cannot be bound.
    """
    _nobody_listens(listen)
    shown = certificates or transport.Certificates(identity)
    sessions = Sessions(identity.session_secret, "" if insecure else shown.fingerprint, daemon.now)
    gate = Gate(daemon.people, daemon.access, sessions, identity.admin_token, daemon.now)
    servicers = Federation(daemon, gate), healthy or health.aio.HealthServicer()
    acceptors: list[grpc.aio.Server] = []
    host, _, port = listen.rpartition(":")
    try:
        for _ in range(ACCEPTORS):
            acceptor = grpc.aio.server(options=_OPTIONS, interceptors=[_Decoding()])
            rpc.add_FederationServicer_to_server(servicers[0], acceptor)
            health_pb2_grpc.add_HealthServicer_to_server(servicers[1], acceptor)
            if reflect:
                names = pb.DESCRIPTOR.services_by_name["Federation"].full_name, health.SERVICE_NAME
                reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], acceptor)
            address = f"{host}:{port}"
            if insecure:
                port = str(acceptor.add_insecure_port(address))
            else:
                port = str(acceptor.add_secure_port(address, shown.credentials()))
            acceptors.append(acceptor)
    except RuntimeError as error:
        raise _taken(listen) from error
    acceptors.append(_local(daemon, gate, servicers))
    return Server(acceptors), f"{host}:{port}"


def _local(daemon: Daemon, gate: Gate, servicers: tuple[Federation, health.aio.HealthServicer]) -> grpc.aio.Server:
    """What the operator's commands talk to: every call, without TLS, on a socket of this machine."""
    path = transport.socket(daemon.state)
    server = grpc.aio.server(options=_OPTIONS, interceptors=[_Decoding()])
    rpc.add_AdminServicer_to_server(Admin(daemon, gate), server)
    rpc.add_FederationServicer_to_server(servicers[0], server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers[1], server)
    try:
        server.add_insecure_port(path)
        Path(path.removeprefix("unix:")).chmod(0o600)  # nobody else's
    except (RuntimeError, OSError) as error:
        raise NotEnough(f"cannot listen on {path}", hint="give --state a folder on a local disk") from error
    return server


class Server:
    """Several gRPC servers on one port, of which the system gives each connection to one.

    One of them takes up one new call with every turn of the event loop. Among hundreds of uploads that is some dozens a
    second, and a thousand clients' heartbeats would wait for many seconds.
    """

    def __init__(self, acceptors: Sequence[grpc.aio.Server]) -> None:
        self._acceptors = acceptors

    async def start(self) -> None:
        await asyncio.gather(*(acceptor.start() for acceptor in self._acceptors))

    async def stop(self, grace: float | None) -> None:
        """Take no new calls; those that are open get so many seconds."""
        await asyncio.gather(*(acceptor.stop(grace) for acceptor in self._acceptors))


def _nobody_listens(address: str) -> None:
    """Our own servers share a port, so the system would let a second daemon share it too.

    Raises:
        UsageError: somebody listens on this address, or it cannot be bound.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, own = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended a moment ago is no matter
            probe.bind(own)
    except OSError as error:
        raise _taken(address) from error


def _taken(address: str) -> UsageError:
    return UsageError(f"cannot listen on {address}: is another daemon there?", hint="--listen HOST:PORT")


class _Decoding(grpc.aio.ServerInterceptor):
    """Bytes that are no message become None, which every call refuses and which ends a stream; gRPC by itself would
    answer UNKNOWN, and log a page for each."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        parse = handler.request_deserializer

        def parsed(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError:
                return None

        return handler._replace(request_deserializer=parsed)
