"""Names from the wire that would be paths elsewhere, hidden, one file on some disks, or a program; and words that a
terminal would obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_client import consent
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.results import pull as pulling
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import stream
from oneround.errors import BadData, NotFound, Refused
from oneround.v1 import federation_pb2 as pb
from tests import hostile

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202ex\r\nevent=joined job=other\n  fingerprint  aaaa"
BAD = [
    *("", ".", "..", "../x.gguf", "a/../../x.gguf", "/etc/x.json", "//x.json", "a//b.json", "a/", "./x.json"),
    *("a\\..\\x.json", "C:\\x.json", "c:x.json", "x.json\0.gguf", "x\n.gguf", "x\x1b[2J.gguf", "\u202efugg.txt"),
    *("CON", "nul.json", "peft/aux.json", "COM1.txt", ".bashrc", ".ssh/x.json", "peft/.x.json", "x.json.", " x.json"),
    *("x .json ", "-rf.json", "$(x).json", "`x`.json", "x;y.json", "é.gguf", "e\u0301.gguf", "ｘ.json", "~/x.json"),
    *("x" * 201 + ".json", "/".join("abcdefghi") + ".json", "a" * 100_000),
]
GOOD = [
    *("notes-f16.gguf", "adapter.gguf", "peft/adapter_model.safetensors", "mlx/adapters.safetensors", "Modelfile"),
    *("README.md", "manifest.json", "model-00001-of-00002.safetensors", "tokenizer.model", "con-f16.gguf", "a..b.json"),
]
PROGRAMS = ["evil.py", "x.sh", "peft/adapter_model.bin", "x.pt", "x.pkl", "x.so", "x.desktop", "Makefile", "x"]


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    assert not stream.is_name(name)
    with pytest.raises(BadData, match="not a path inside") as raised:
        remotes.local_path(tmp_path, pb.Artifact(name=name, digest="0" * 64))
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are(tmp_path: Path, name: str) -> None:
    found = remotes.local_path(tmp_path, pb.Artifact(name=name, digest="0" * 64))
    assert found.relative_to(tmp_path).as_posix() == name
    longest = remotes.partial_path(found, pb.Artifact(name=name, digest="0" * 64)).name
    assert len(longest) < len(name) + 20


def test_the_longest_name_fits_a_disk(tmp_path: Path) -> None:
    name = "x" * 195 + ".json"
    found = remotes.local_path(tmp_path, pb.Artifact(name=name, digest="0" * 64))
    remotes.partial_path(found, pb.Artifact(name=name, digest="0" * 64)).touch()


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_and_pickles_are_not_fetched(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadData, match="files of this kind are never fetched"):
        remotes.local_path(tmp_path, pb.Artifact(name=name, digest="0" * 64))


def test_a_link_in_the_folder_leads_nowhere(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    (inside / "peft").symlink_to(outside)
    with pytest.raises(BadData, match="a folder on the way is a link"):
        remotes.local_path(inside, pb.Artifact(name="peft/x.json", digest="0" * 64))
    (tmp_path / "to").symlink_to(inside)  # which is the person's own choice
    assert remotes.local_path(tmp_path / "to", pb.Artifact(name="x.json", digest="0" * 64))


async def pull(tmp_path: Path, *names: str) -> None:
    """`pull --artifact all` of a publication with files of these names."""
    source = tmp_path / "source"
    source.write_text("hostile")
    job, files = hostile.announced(tmp_path)
    artifacts = [hostile.artifact(source, name) for name in names]
    server = hostile.Hostile(job, {**files, stream.digest(source): source})
    server.status.publications.append(pb.Publication(version=1, artifacts=artifacts))

    async with (
        hostile.serving(server) as address,
        remotes.connect(address, Pins(tmp_path), lambda *_: None, insecure=True) as remote,
    ):
        made = pulling.publication(await remote.job("notes"), 0)
        chosen = pulling.wanted(made, "all", Screen())
        await pulling.fetch(remote, "notes", chosen, tmp_path / "to" / "here", Screen())


@pytest.mark.parametrize("name", ["../x.json", "/tmp/oneround-attack.json", ".bashrc", "evil.py", "a\\b.json"])
async def test_pull_writes_nothing_of_a_publication_with_a_hostile_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadData):
        await pull(tmp_path, "README.md", name)
    assert not (tmp_path / "to").exists() and not Path("/tmp/oneround-attack.json").exists()


async def test_pull_of_two_files_that_are_one_on_some_disks(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="have one name"):
        await pull(tmp_path, "README.md", "readme.md")
    assert not (tmp_path / "to").exists()
    await pull(tmp_path, "README.md", "peft/README.md")
    assert (tmp_path / "to" / "here" / "peft" / "README.md").read_text() == "hostile"


def fit_for_a_terminal(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


@pytest.mark.parametrize(
    "event",
    [
        events.Joined(ESCAPES, ESCAPES, ESCAPES),
        events.Retry(ESCAPES, 1.0),
        events.JobNotAccepted(ESCAPES),
        events.CoordinatorFound(ESCAPES, ESCAPES),
        events.NotTakingPart(ESCAPES, ESCAPES, ESCAPES),
        events.Pulled(ESCAPES, 1),
        events.PulledInto(ESCAPES),
        events.ProgressMade(ESCAPES, 1, 1, 0.0),
    ],
)
def test_words_from_elsewhere_stay_on_their_line(event: events.Event, capsys: pytest.CaptureFixture[str]) -> None:
    Screen().say(event)
    said = capsys.readouterr().out
    assert fit_for_a_terminal(said) and said.count("\n") == 1
    Screen(as_json=True).say(event)
    assert capsys.readouterr().out.isascii(), "JSON has its own way to write such letters"


def test_names_in_refusals() -> None:
    jobs = [pb.JobStatus(spec=pb.JobSpec(name=name), takes_contributions=True) for name in (ESCAPES, "b" * 100_000)]
    with pytest.raises(Refused) as several:
        consent.choose_job(jobs, "")
    with pytest.raises(NotFound) as none:
        consent.choose_job(jobs, "other")
    for said in (str(several.value), several.value.hint, none.value.hint):
        assert fit_for_a_terminal(said) and "\n" not in said and len(said) < 600


async def test_what_a_coordinator_says_of_an_error(tmp_path: Path) -> None:
    class Rude(hostile.Hostile):
        async def Describe(self, request: Any, context: Any) -> pb.Job:
            trailing = (("hint-bin", (ESCAPES + "\xff").encode("latin-1", "replace")),)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, ESCAPES * 50, trailing)
            raise AssertionError

    async with (
        hostile.serving(Rude(*hostile.announced(tmp_path))) as address,
        remotes.connect(address, Pins(tmp_path), lambda *_: None, insecure=True) as remote,
    ):
        with pytest.raises(Refused) as raised:
            await remote.describe("notes")
        for said in (str(raised.value), raised.value.hint):
            assert said and fit_for_a_terminal(said) and "\n" not in said and len(said) < 600
