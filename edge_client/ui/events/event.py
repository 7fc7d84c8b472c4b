"""What every event is: typed fields, and a sentence for people made of them."""

from __future__ import annotations

import re
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

# What a field holds, in the words of docs/events.md.
LINES = "lines of text"
Address = Annotated[str, "HOST:PORT"]
Fingerprint = Annotated[str, "64 hex digits, in groups of four"]
Sha256 = Annotated[str, "64 hex digits"]
File = Annotated[str, "path"]
Folder = Annotated[str, "path"]
Lines = Annotated[str, LINES]
Words = Annotated[str, "part of a sentence"]
Bytes = Annotated[int, "bytes"]
Seconds = Annotated[float, "seconds"]
UnixTime = Annotated[float, "seconds since the Unix epoch"]
Gigabytes = Annotated[float, "10^9 bytes"]
Nats = Annotated[float, "nats per token"]
Share = Annotated[float, "from 0 to 1"]

EVENTS: dict[str, type[Event]] = {}  # by name on the wire, in the order of their modules


@dataclass(frozen=True)
class Event:
    """Something that happened, to be told to people or to scripts.

    The fields of a subclass are the keys of its JSON, in their order; one that is None by default is left out while it
    is None. Its docstring says when it happens. The placeholders of its template are fields or properties. Its name on
    the wire is the class's in snake case, unless `event` gives another.
    """

    event: ClassVar[str]
    template: ClassVar[str]

    def __init_subclass__(cls, *, event: str = "") -> None:
        cls.event = event or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if cls.event in EVENTS:
            raise TypeError(f"two events are called {cls.event!r}")
        EVENTS[cls.event] = cls

    def as_json(self) -> dict[str, Any]:
        """The keys and values of its line, without its name."""
        optional = {field.name for field in fields(self) if field.default is not MISSING}
        return {key: value for key, value in asdict(self).items() if key not in optional or value is not None}

    @classmethod
    @cache
    def lines(cls) -> frozenset[str]:
        """The fields that hold lines of our own, which may be printed as such."""
        hints = get_type_hints(cls, include_extras=True)
        return frozenset(field.name for field in fields(cls) if LINES in get_args(hints[field.name]))
