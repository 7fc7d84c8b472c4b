"""Who may see a job, and who may take part in it: decisions, without effects."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from oneround import lan

WHO = ("open", "token", "approved")
Standing = Literal["in", "may ask", "out"]


@dataclass(frozen=True)
class Caller:
    """Whoever makes a call: the client with this id, on the local network or not; or the operator."""

    client_id: str = ""
    local: bool = False
    operator: bool = False


def standing(who: str, *, local: bool, passed: bool) -> Standing:
    """Where somebody stands with a job for `who`. With a pass one is in, wherever one is; from the local network one is
    in an open job, and may ask for one that takes approval; anybody else is not to know that there is one."""
    if passed or (who == "open" and local):
        return "in"
    return "may ask" if who == "approved" and local else "out"


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
    if address.is_loopback or address.is_private or address.is_link_local:
        return True
    return any(str(address) == own.partition("%")[0] for each in interfaces for own in each.addresses)
