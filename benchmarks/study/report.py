"""Cells → a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(out: Path, ledger: Any, wanted: Any, preset: str, machine: dict[str, Any]) -> dict[str, Any]:
    return {"preset": preset, "machine": machine, "cells": len(ledger.found)}
