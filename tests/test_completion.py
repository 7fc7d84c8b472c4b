"""TAB in a shell, as a person has it after `--install-completion`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import commands, terminal

BASH = shutil.which("bash") or ""
pytestmark = pytest.mark.skipif(not BASH, reason="needs bash")


def at_home(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": f"{commands.BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("edge-client jo", "edge-client join"),
        ("edge-client join --ser", "edge-client join --server"),
        ("coordinator ser", "coordinator serve"),
        ("adapter-convert insp", "adapter-convert inspect"),
    ],
)
def test_tab_completes(tmp_path: Path, typed: str, completed: str) -> None:
    name = typed.split()[0]
    (tmp_path / ".bashrc").write_text("PS1='ready> '\n")
    installed = subprocess.run(
        [BASH, "-c", f"{name} --install-completion; true"],
        env={**os.environ, **at_home(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bash completion installed" in installed.stdout, installed
    with terminal.running(BASH, "-i", env=at_home(tmp_path)) as shell:
        shell.expect("ready> ")
        shell.type(f"{typed}\t")
        shell.expect(f"{completed} ")
        shell.type("\x15exit\n")  # Ctrl-U empties the line
        shell.finish(code=0)


@pytest.mark.parametrize("name", ["edge-client", "coordinator", "adapter-convert"])
def test_the_script_can_be_shown(tmp_path: Path, name: str) -> None:
    """For people who keep their shell's files in order themselves; what is shown is what bash takes."""
    shown = subprocess.run(
        [BASH, "-c", f"{name} --show-completion > script; bash -n script && cat script"],
        env={**os.environ, **at_home(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"complete -o default -F _{name.replace('-', '_')}_completion {name}" in shown
    assert not (tmp_path / ".bashrc").exists()
