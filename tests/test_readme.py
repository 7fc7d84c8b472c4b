"""What the README says is so: every key of a job with its default, and every command with its options."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from google.protobuf.descriptor import Descriptor

import converters.cli
import coordinator.cli.app
import edge_client.cli.app
from coordinator.jobs import spec
from oneround.v1 import federation_pb2 as pb

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
APPS = {
    "adapter-convert": converters.cli.app,
    "coordinator": coordinator.cli.app.app,
    "edge-client": edge_client.cli.app.app,
}


def keys(message: Descriptor, prefix: str = "") -> dict[str, object]:
    """Every key of a job file and its default."""
    found: dict[str, object] = {}
    for field in message.fields:
        if field.message_type is None:
            found[prefix + field.name] = "" if field.is_repeated else field.default_value
        else:
            found |= keys(field.message_type, f"{field.name}.")
    return found


def test_every_key_and_default_is_in_the_table() -> None:
    table = README.split("## A job's keys")[1].split("## Commands")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (?:`([^`]*)`)? \|", table, flags=re.M))
    expected = keys(pb.JobSpec.DESCRIPTOR)
    assert rows.keys() == expected.keys()
    filled = spec.parse({"name": "x", "model": {"base": "org/model"}})
    for key, shown in rows.items():
        value = expected[key]
        if key == "lora.target_modules":
            assert [shown] == list(filled.lora.target_modules)
        elif key == "publish.gguf":
            assert shown.split(", ") == list(filled.publish.gguf)
        elif isinstance(value, bool):
            assert shown == str(value).lower()
        elif isinstance(value, str):
            assert shown == value
        else:
            assert float(shown) == value, key


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert targets and not missing


def command_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    lines = (re.split(r"\s#", line)[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line.split(" ")[0] in APPS]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_is_one(line: str) -> None:
    name, sub, *arguments = shlex.split(line)
    group = typer.main.get_command(APPS[name])
    if name == "adapter-convert" and sub != "inspect":  # `convert` may be left out
        sub, arguments = "convert", [sub, *arguments]
    command = group.get_command(None, sub)  # type: ignore[attr-defined]
    assert command is not None, line
    command.make_context(sub, arguments, resilient_parsing=False)


@pytest.mark.parametrize("name", APPS)
def test_every_command_helps_with_an_example(name: str) -> None:
    group = typer.main.get_command(APPS[name])
    for sub, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help, sub
        assert f"Example: {name} {'' if sub == 'convert' else sub}" in (command.epilog or ""), sub
