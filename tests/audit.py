"""Known vulnerabilities in what constraints.txt pins, for `make lint`: fails when there is one, and says aloud when
nobody could be asked."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

ASKED = "https://pypi.org/pypi/pip/json"  # where pip-audit asks, of every package
ANSWER_SECONDS = 3.0
AUDIT_SECONDS = 120.0  # about a hundred requests
PINS = Path(__file__).parent.parent / "constraints.txt"


def answers(url: str) -> bool:
    """Whether the vulnerability service is there."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as reply:
            return "vulnerabilities" in json.load(reply)
    except (OSError, ValueError):  # URLError is an OSError
        return False


def vulnerable(found: str) -> list[str]:
    """A line for each vulnerability in what pip-audit prints as JSON.

    Raises:
        ValueError: it is no such thing.
    """
    lines = []
    for package in json.loads(found)["dependencies"]:
        for hole in package.get("vulns", ()):
            mended = ", ".join(hole["fix_versions"]) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {hole['id']}, mended in {mended}")
    return lines


def main(url: str = ASKED) -> int:
    if not answers(url):
        print(f"AUDIT SKIPPED: {url} does not answer within {ANSWER_SECONDS:.0f} s. Nothing is said of {PINS.name}.")
        return 0
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit is not installed here: pip install -c constraints.txt -e '.[dev]'")
        return 1
    # The pins are all there is to look at: nothing is resolved, built or installed.
    command = [
        "pip_audit",
        "-r",
        str(PINS),
        "--no-deps",
        "--disable-pip",
        "-f",
        "json",
        "--progress-spinner",
        "off",
        "--timeout",
        "5",
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=AUDIT_SECONDS, check=False
        )
        lines = vulnerable(done.stdout)
    except subprocess.TimeoutExpired:
        print(f"AUDIT SKIPPED: no word from the service within {AUDIT_SECONDS:.0f} s. Nothing is said of {PINS.name}.")
        return 0
    except (ValueError, KeyError):
        print(f"AUDIT SKIPPED: pip-audit gave no list.\n{done.stderr.strip()[-2000:]}")
        return 0
    print("\n".join(lines) or f"No known vulnerability in {PINS.name}.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
