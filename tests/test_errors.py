"""Every error keeps its meaning on the way over the wire, and its exit code."""

import grpc
import pytest

# Classes that are defined beside what they are about register with the tree when they are imported.
import converters.families
import edge_client.session
from oneround import errors
from oneround.errors import OneroundError, Refused


@pytest.mark.parametrize("kind", list(errors.tree()), ids=lambda kind: kind.__name__)
def test_an_error_comes_back_from_its_status(kind: type[OneroundError]) -> None:
    assert kind.status in grpc.StatusCode.__members__
    back = errors.from_status(kind.status, "a sentence", "a command")
    assert (str(back), back.hint) == ("a sentence", "a command")
    assert issubclass(kind, type(back)), "as itself, or as what it derives from"
    assert back.exit_code == kind.exit_code
    nearer = [each for each in errors.tree() if issubclass(kind, each) and each.status == kind.status]
    assert type(back) is nearer[0]


def test_classes_with_a_status_of_their_own_come_back_as_themselves() -> None:
    named = ("NotFound", "Denied", "NotSignedIn", "Conflict", "Interrupted", "UsageError", "BadData", "NotEnough")
    for name in named:
        kind = getattr(errors, name)
        assert type(errors.from_status(kind.status, "")) is kind


@pytest.mark.parametrize("status", ["INTERNAL", "UNKNOWN"])
def test_a_fault_of_the_other_side_is_no_refusal(status: str) -> None:
    back = errors.from_status(status, "a fault in the coordinator")
    assert type(back) is OneroundError and back.exit_code == 1


def test_a_status_that_is_not_ours_is_a_refusal() -> None:
    assert type(errors.from_status("UNIMPLEMENTED", "an older coordinator")) is Refused


assert converters.families and edge_client.session
