"""Says on the local network where this coordinator is, by mDNS, and says it anew when its addresses change."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence

import structlog
from zeroconf import Error, IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from oneround import lan

LOOK_AGAIN = 15.0  # seconds between two looks at this machine's addresses

log = structlog.get_logger()


async def advertise(
    host: str,
    port: int,
    fingerprint: str,
    *,
    name: str = "",
    interfaces: Callable[[], Sequence[lan.Interface]] = lan.interfaces,
    every: float = LOOK_AGAIN,
) -> None:
    """Answer those who look for coordinators, until cancelled.

    `host` and `port` are what the server is bound to, `fingerprint` is its key's, `name` is this machine's if empty. A
    network that takes no multicast is logged, and tried again: a coordinator does not need to be found to work.
    """
    advertised: list[str] = []
    responder: AsyncZeroconf | None = None
    try:
        while True:
            addresses = lan.listening(host, interfaces())
            if addresses != advertised:
                if responder is not None:
                    await _end(responder)
                    responder = None
                try:
                    responder = await _say(name or socket.gethostname(), addresses, port, fingerprint)
                    if responder is not None:
                        log.info("advertised", addresses=addresses, port=port)
                except (OSError, Error) as error:
                    log.warning("not_advertised", addresses=addresses, reason=str(error) or type(error).__name__)
                advertised = addresses if responder is not None else []
            await asyncio.sleep(every)
    finally:
        if responder is not None:
            await _end(responder)


async def _say(machine: str, addresses: Sequence[str], port: int, fingerprint: str) -> AsyncZeroconf | None:
    if not addresses:
        return None
    plain = machine.partition(".")[0][:40] or "coordinator"
    info = AsyncServiceInfo(
        lan.SERVICE,
        # Two coordinators on one machine differ by their keys.
        f"{plain} {fingerprint[:8]}.{lan.SERVICE}",
        port=port,
        addresses=[ipaddress.ip_address(address).packed for address in addresses],
        properties={lan.KEY: fingerprint.encode()},
        server=f"oneround-{fingerprint[:16]}.local.",
    )
    responder = AsyncZeroconf(interfaces=list(addresses), ip_version=_version(addresses))
    try:
        await (await responder.async_register_service(info, allow_name_change=True))
    except BaseException:
        await responder.async_close()
        raise
    return responder


async def _end(responder: AsyncZeroconf) -> None:
    """Say goodbye, so that nobody looks here any more."""
    await responder.async_unregister_all_services()
    await responder.async_close()


def _version(addresses: Sequence[str]) -> IPVersion:
    versions = {ipaddress.ip_address(address).version for address in addresses}
    return IPVersion.All if len(versions) == 2 else IPVersion.V4Only if versions == {4} else IPVersion.V6Only
