"""Who may see a job, and who may take part in it: decisions, without effects."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from oneround import lan

JOB_ACCESS = ("open", "token", "approved")
Access = Literal["in", "may ask", "out"]


# Loopback, private and link-local networks: RFC 1918, 3927, 4193, 4291.
_PRIVATE = tuple(
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
    )
)


@dataclass(frozen=True)
class Caller:
    """Who makes a call: the client with this id, on the local network or not; or the operator."""

    client_id: str = ""
    local: bool = False
    operator: bool = False


def access(job_access: str, *, local: bool, passed: bool) -> Access:
    """What somebody may do with a job whose access is `who`. With a pass they are in, wherever they are. From the local
    network they are in an open job, and may ask to be let into one that takes approval. Anybody else may not know that
    there is such a job."""
    if passed or (job_access == "open" and local):
        return "in"
    return "may ask" if job_access == "approved" and local else "out"


def is_local(peer: str, interfaces: Iterable[lan.Interface]) -> bool:
    """Whether a peer, as gRPC names it, is this machine or on one of its own networks.

    Private addresses are: no router on the internet passes them on. Of others, those of this machine itself.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return True
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if any(address in network for network in _PRIVATE):  # is_private takes in more, and other things in each Python
        return True
    return any(str(address) == own.partition("%")[0] for interface in interfaces for own in interface.addresses)
