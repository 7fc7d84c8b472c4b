"""Checks of this machine by itself: what is installed, what it trains on, and which networks it is on."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterable

from packaging.requirements import Requirement
from packaging.version import Version

from edge_client import backends
from edge_client.doctor.finding import Case, Finding, note, ok
from oneround import lan
from oneround.errors import UsageError

PYTHONS = ((3, 11), (3, 13))  # the oldest and the newest that it is tried with
_LOCAL_NETWORK = 15  # the macOS that began to guard the local network


async def python(_: Case) -> Finding:
    version = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return ok("python", version)
    tried = " to ".join(".".join(map(str, numbers)) for numbers in PYTHONS)
    return note("python", f"{version}; oneround is tried with {tried}", "install one of these, and oneround into it")


async def backend(case: Case) -> Finding:
    case.backend = backends.choose(case.backend_name)
    device = case.backend.device()
    says = f"{case.backend.name} on {device}"
    if device.startswith("cpu") and shutil.which("nvidia-smi"):
        return note(
            "backend",
            f"{says}, though this machine has an NVIDIA GPU",
            "install a build for CUDA, and see that `nvidia-smi` works: https://pytorch.org/get-started/locally",
        )
    if "slow" in device:
        return note("backend", says, "pip install 'oneround[torch]', or the system's OpenBLAS")
    return ok("backend", says)


async def packages(case: Case) -> Finding:
    extra = case.backend.name if case.backend else ""
    try:
        requirements = importlib.metadata.requires("oneround") or []
    except importlib.metadata.PackageNotFoundError:
        return note("packages", "oneround runs here without being installed", "pip install oneround")
    if wrong := unmet(requirements, extra, installed):
        raise UsageError("; ".join(wrong), hint=f"pip install --upgrade 'oneround[{extra}]'")
    shown = ("oneround", "grpcio", "numpy", *of_backends(requirements))
    return ok("packages", ", ".join(f"{name} {version}" for name in shown if (version := installed(name))))


def of_backends(requirements: Iterable[str]) -> list[str]:
    """The distributions that training backends bring along, as their extras name them, each once."""
    markers = [(requirement.name, requirement.marker) for requirement in map(Requirement, requirements)]
    names = (
        name
        for extra in backends.BACKENDS
        for name, marker in markers
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
    )
    return list(dict.fromkeys(names))


def unmet(requirements: Iterable[str], extra: str, version_of: Callable[[str], str | None]) -> list[str]:
    """What of a distribution's requirements, those of an extra too, is missing here or of another version."""
    wrong = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = version_of(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(Version(version), prereleases=True):
            wrong.append(f"{requirement.name} {version} is here, {requirement.specifier} is needed")
    return wrong


def installed(name: str) -> str | None:
    """The version of a distribution here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


async def llama_cpp(_: Case) -> Finding:
    """Only `chat` needs it, so it never stops a job."""
    hint = "pip install --force-reinstall 'oneround[serve]', if you want to chat with the result on this machine"
    if importlib.util.find_spec("llama_cpp") is None:
        return note("llama.cpp", "not here; taking part does not need it", "pip install 'oneround[serve]', to chat")
    try:
        importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        return note("llama.cpp", f"here, but cannot be used: {error}", hint)
    return ok("llama.cpp", f"llama-cpp-python {installed('llama-cpp-python')}")


async def network(_: Case) -> Finding:
    return networks(lan.interfaces())


def networks(interfaces: Iterable[lan.Interface]) -> Finding:
    """Which interfaces a coordinator is looked for through, and why not the others."""
    used, passed = [], []
    for interface in interfaces:
        if reason := lan.passed_over(interface):
            passed.append(f"{interface.name} ({reason})")
        else:
            used.append(f"{interface.name} ({', '.join(lan.reachable([interface]))})")
    others = f"; not through {', '.join(passed)}" if passed else ""
    if used:
        return ok("network", f"coordinators are looked for through {', '.join(used)}{others}")
    return note(
        "network",
        f"this machine is on no local network, and finds coordinators on itself alone{others}",
        "connect to the network, or give --server HOST:PORT",
    )


async def local_network(case: Case) -> Finding | None:
    return local_network_guard(sys.platform, platform.mac_ver()[0], case.unreached)


def local_network_guard(system: str, release: str, unreached: str) -> Finding | None:
    """macOS 15 and later let an app reach the local network only when the person has allowed it (Apple's TN3179). What
    is not allowed fails as `No route to host`, and mDNS hears nothing; so it is worth a look where nobody answers."""
    major = release.partition(".")[0]
    if system != "darwin" or not unreached or not major.isdecimal() or int(major) < _LOCAL_NETWORK:
        return None
    return note(
        "local network",
        f"macOS {release} may be keeping this program from the local network: that looks like `No route to host`, or "
        "like nobody there",
        "System Settings > Privacy & Security > Local Network: switch on the app that you type this in, and start it "
        "anew; or use Apple's Terminal or ssh, which need no permission",
    )
