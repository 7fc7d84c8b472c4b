"""`edge-client doctor`: what would stop this machine from taking part, and the way out. It joins no job."""

from __future__ import annotations

from collections.abc import AsyncIterator

from rich.console import Console

from edge_client.doctor import job_checks, machine_checks
from edge_client.doctor.finding import Case, Check, Finding, problem
from edge_client.ui import rows
from edge_client.ui.rows import CheckResult
from edge_client.ui.screen import Screen
from oneround.errors import NotEnough, OneroundError
from oneround.text import printable

# In this order: the later ones build on what the earlier ones found.
CHECKS: dict[str, Check] = {
    "python": machine_checks.python,
    "backend": machine_checks.backend,
    "packages": machine_checks.packages,
    "llama.cpp": machine_checks.llama_cpp,
    "network": machine_checks.network,
    "coordinator": job_checks.coordinator,
    "local network": machine_checks.local_network,
    "certificate": job_checks.certificate,
    "clock": job_checks.clock,
    "job": job_checks.job,
    "base model": job_checks.base,
    "data": job_checks.data,
    "compatibility": job_checks.compatibility,
    "disk": job_checks.room,
    "memory": job_checks.memory,
}

_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


async def examine(case: Case, screen: Screen) -> AsyncIterator[Finding]:
    """The findings of all checks, as they come."""
    async with case.open_now:
        for name, check in CHECKS.items():
            if check is job_checks.coordinator:  # which may ask the person for one of several
                finding = await _finding(name, check, case)
            else:
                with screen.busy(f"looking at: {name}"):
                    finding = await _finding(name, check, case)
            if finding is not None:
                yield finding


async def _finding(name: str, check: Check, case: Case) -> Finding | None:
    try:
        return await check(case)
    except OneroundError as error:
        return problem(name, error)
    except OSError as error:  # what this machine does not let us look at
        return problem(name, NotEnough(f"this machine does not let us: {error}"))


async def report(case: Case, screen: Screen, *, as_json: bool) -> int:
    """Print each finding as it comes; returns the exit code of the first problem, 0 if there is none."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    findings = []
    async for finding in examine(case, screen):
        findings.append(finding)
        if as_json:
            rows.print_line(CheckResult(finding.check, finding.level, finding.says, finding.hint))
            continue
        console.print(f"[{_STYLES[finding.level]}]{finding.level:<8}[/] {finding.check:<14}", end="")
        console.print(printable(finding.says), markup=False)
        if finding.hint:
            console.print(f"{'':24}[dim]Try:[/] ", end="")
            console.print(printable(finding.hint), markup=False)
    problems = [finding for finding in findings if finding.level == "problem"]
    if not as_json:
        stops = {0: "Nothing stops", 1: "1 problem stops"}.get(len(problems), f"{len(problems)} problems stop")
        console.print(f"\n{stops} this machine from taking part.")
    return problems[0].exit_code if problems else 0
