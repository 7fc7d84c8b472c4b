"""Which coordinators the local network speaks of, by mDNS. Nothing heard here is trusted: it only says where to ask."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroconf import Error, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from oneround import lan
from oneround.errors import NotEnough, Unreachable, UsageError
from oneround.text import label

LOOK_SECONDS = 3.0
_MOST = 64  # that are listed; anybody on the network can say anything


@dataclass(frozen=True)
class DiscoveredCoordinator:
    """A coordinator that makes itself known: its name, where it says it is, and its key's fingerprint."""

    name: str
    addresses: tuple[str, ...]  # HOST:PORT, IPv4 first
    fingerprint: str


async def look(
    seconds: float = LOOK_SECONDS,
    enough: Callable[[DiscoveredCoordinator], bool] = lambda coordinator: False,
    *,
    interfaces: Callable[[], Sequence[lan.Interface]] = lan.interfaces,
) -> list[DiscoveredCoordinator]:
    """The coordinators that answer within so many seconds, by name; ends early with one that is `enough`.

    Raises:
        NotEnough: this machine lets nobody listen to the network.
    """
    try:
        listener = AsyncZeroconf(interfaces=[lan.LOOPBACK, *lan.reachable(interfaces())], ip_version=IPVersion.All)
    except (OSError, Error) as error:
        raise NotEnough(
            f"this machine does not let us look around on its network: {error}", hint="add --server HOST:PORT"
        ) from error
    heard: dict[str, DiscoveredCoordinator] = {}
    asking: set[asyncio.Task[None]] = set()
    done = asyncio.Event()

    async def ask(zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(lan.SERVICE, name)
        if await info.async_request(zeroconf, seconds * 1000) and (coordinator := read(info)) and len(heard) < _MOST:
            heard[name] = coordinator
            if enough(coordinator):
                done.set()

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            heard.pop(name, None)
        elif len(asking) < _MOST:
            asking.add(asyncio.ensure_future(ask(zeroconf, name)))

    try:
        browser = AsyncServiceBrowser(listener.zeroconf, lan.SERVICE, handlers=[changed])
        try:
            async with asyncio.timeout(seconds):
                await done.wait()
        except TimeoutError:
            pass
        await browser.async_cancel()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    finally:
        await listener.async_close()
    return sorted(heard.values(), key=lambda coordinator: (coordinator.name, coordinator.addresses))


def read(info: AsyncServiceInfo) -> DiscoveredCoordinator | None:
    """What a record says, or None when it cannot be a coordinator's."""
    fingerprint, port = lan.fingerprint(info.properties), info.port or 0
    hosts = [ipaddress.ip_address(text) for text in info.parsed_addresses(IPVersion.All)]
    hosts.sort(key=lambda host: (host.version, host.is_link_local))
    addresses = tuple(lan.join_host(str(host), port) for host in hosts if not host.is_multicast)
    if not fingerprint or not addresses or not 0 < port < 65536:
        return None
    name = info.name.removesuffix(f".{info.type}")
    return DiscoveredCoordinator(label(name), addresses, fingerprint)


def only(coordinators: Sequence[DiscoveredCoordinator]) -> DiscoveredCoordinator:
    """The one that there is.

    Raises:
        Unreachable: there is none.
        UsageError: there are several.
    """
    if not coordinators:
        raise Unreachable(
            "no coordinator makes itself known on this network",
            hint="edge-client join --server HOST:PORT, as `coordinator serve` prints it",
        )
    if len(coordinators) > 1:
        listed = ", ".join(f"{coordinator.name} at {coordinator.addresses[0]}" for coordinator in coordinators)
        raise UsageError(f"several coordinators make themselves known on this network: {listed}", hint="add --server")
    return coordinators[0]
