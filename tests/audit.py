"""Known vulnerabilities in what constraints.txt pins, for `make lint`: fails when there is one, and says aloud when
nobody could be asked."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

# Asked as pip-audit asks, and of a release that has known holes: a mirror that answers and knows of none is no answer.
KNOWN = "https://pypi.org/pypi/requests/2.19.1/json"
ANSWER_SECONDS = 3.0
AUDIT_SECONDS = 120.0  # about a hundred requests
PINS = Path(__file__).parent.parent / "constraints.txt"


def answers(url: str) -> bool:
    """Whether the vulnerability service is there."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as reply:
            return bool(json.load(reply)["vulnerabilities"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def vulnerable(text: str) -> tuple[list[str], int]:
    """A line for each vulnerability in what pip-audit prints as JSON, and how many packages it was told of.

    Raises:
        ValueError: it is no such thing.
    """
    packages = [package for package in json.loads(text)["dependencies"] if "skip_reason" not in package]
    lines = [
        f"{found['name']} {found['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'none yet'}"
        for found in packages
        for hole in found["vulns"]
    ]
    return lines, len(packages)


def main(url: str = KNOWN) -> int:
    if not answers(url):
        return _skipped(f"{url} does not answer as it should within {ANSWER_SECONDS:.0f} s")
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit is not installed here: pip install -c constraints.txt -e '.[dev]'")
        return 1
    # The pins are all there is to look at: nothing is resolved, built or installed.
    command = ["pip_audit", "-r", str(PINS), "--no-deps", "--disable-pip", "-f", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command, "--timeout", "5"],
            capture_output=True,
            text=True,
            timeout=AUDIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _skipped(f"no list within {AUDIT_SECONDS:.0f} s")
    try:
        lines, count = vulnerable(done.stdout)
    except ValueError:
        return _skipped(f"pip-audit gave no list:\n{done.stderr.strip()[-2000:]}\n")
    print("\n".join(lines) or f"No known vulnerability in {count} of {len(PINS.read_text().split())} pinned packages.")
    return 1 if lines else 0


def _skipped(why: str) -> int:
    print(f"AUDIT SKIPPED: {why}. Nothing is said of {PINS.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
