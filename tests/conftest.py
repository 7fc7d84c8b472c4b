"""Hypothesis draws the same examples in every `make test`, so that a failure is of the change and not of the day;
`make test-all` draws new ones."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None)
settings.load_profile("same")
