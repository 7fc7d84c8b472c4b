"""The model folders that attacks begin with."""

from tests.converters.conftest import base, bases, stories

__all__ = ["base", "bases", "stories"]
