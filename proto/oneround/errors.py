"""Everything that goes wrong on purpose, in one tree.

    OneroundError            base of all; str() is a sentence for the person, `hint` the command to run next;
                             raised itself for a fault of the other side: exit 1
    ├── UsageError           exit 2   the command line or the job file asks for something that is not there
    ├── Refused              exit 3   the other side understood and said no
    │   ├── NotFound                  what it was asked for is not there
    │   ├── Denied                    this is not for whoever asks
    │   ├── NotSignedIn               the other side has to know who asks, and does not
    │   └── Conflict                  something else is there already
    ├── Unreachable          exit 4   no coordinator answers
    │   └── Interrupted               an exchange broke off; it can be taken up again
    ├── BadData              exit 5   a file from a user or from the wire is not what it says it is
    │   ├── BadAdapter                an adapter that cannot be represented, or is not sound
    │   │   └── LayoutMismatch        adapters or models that do not fit each other
    │   └── BadModel                  a base model's files are missing or not understood
    └── NotEnough            exit 6   memory or disk

Each class has an exit code for the command line and the name of a gRPC status for the wire.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator


class OneroundError(Exception):
    """What happened and why, in a sentence; `hint` is what to do or run next."""

    exit_code = 1
    status = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OneroundError):
    exit_code = 2
    status = "INVALID_ARGUMENT"


class Refused(OneroundError):
    exit_code = 3
    status = "FAILED_PRECONDITION"


class NotFound(Refused):
    status = "NOT_FOUND"


class Denied(Refused):
    status = "PERMISSION_DENIED"


class NotSignedIn(Refused):
    status = "UNAUTHENTICATED"


class Conflict(Refused):
    status = "ALREADY_EXISTS"


class Unreachable(OneroundError):
    exit_code = 4
    status = "UNAVAILABLE"


class Interrupted(Unreachable):
    status = "ABORTED"


class BadData(OneroundError):
    exit_code = 5
    status = "DATA_LOSS"


class BadAdapter(BadData):
    pass


class LayoutMismatch(BadAdapter):
    pass


class BadModel(BadData):
    pass


FULL = (errno.ENOSPC, errno.EDQUOT)  # an OSError that means NotEnough


class NotEnough(OneroundError):
    exit_code = 6
    status = "RESOURCE_EXHAUSTED"


def tree(kind: type[OneroundError] = OneroundError) -> Iterator[type[OneroundError]]:
    """A class and all that derive from it, each before those that derive from it."""
    yield kind
    for subclass in kind.__subclasses__():
        yield from tree(subclass)


def from_status(status: str, message: str, hint: str = "") -> OneroundError:
    """The error that a gRPC status stands for: of the classes that share a status, the one nearest the root. A status
    that none of ours has is a refusal, but for UNKNOWN, which stands for a fault like INTERNAL."""
    kinds = {kind.status: kind for kind in reversed(list(tree()))}
    return kinds.get("INTERNAL" if status == "UNKNOWN" else status, Refused)(message, hint=hint)
