"""Before anything leaves the machine: what is said of it is complete, and who says no leaves no trace."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from converters import tensors
from coordinator.jobs import spec as job
from edge_client import consent, outbox
from oneround.errors import NotFound, Refused
from oneround.v1 import federation_pb2 as pb
from tests import commands, terminal
from tests.daemons import SPEC, running
from tests.edge_client.backends.parity import usable
from tests.fakes import FakeBackend
from tests.participants import participant, take_part

BASE = Path(__file__).parents[2] / "benchmarks" / "base"
JOB = f'name = "notes"\n[model]\nbase = "{BASE}"\n[lora]\nrank = 2\n[train]\nepochs = 30\n'

# Each field of each message that `join` sends, and the words that stand for it. None: the coordinator said it first.
SAID: dict[str, dict[str, str | None]] = {
    "ChallengeRequest": {},
    "SignInRequest": {
        "key": "a public key that stands for this machine",
        "challenge": None,
        "signature": None,  # which shows that the key is its own
        "token": None,  # which the operator made
    },
    "ListJobsRequest": {},
    "JoinRequest": {
        "job": None,
        "client_name": "the name 'vera'",
        "machine": "Linux arm64",
    },
    "Machine": {"platform": "Linux arm64", "backend": "torch on", "device": "on cuda"},
    "HeartbeatRequest": {
        "lease": None,
        "step": "the step",
        "total_steps": "how many there will be",
        "loss": "the loss",
        "tokens_per_second": "tokens per second",
    },
    "DownloadRequest": {"job": None, "digest": "which files of the base model are missing", "offset": "missing here"},
    "OpenUploadRequest": {"lease": None, "declaration": "with its size"},
    "Declaration": {
        "digest": "SHA-256",
        "size": "with its size",
        "num_examples": "the numbers of examples",
        "num_tokens": "target tokens",
        "steps": "and steps",
        "train_loss": "the mean loss of the last epoch",
    },
    "UploadRequest": {"lease": None, "offset": None, "data": "one LoRA adapter, rank 8 in float16"},
    "WatchRequest": {"job": None},
    "DescribeRequest": {"job": None},
}
ASKED_FOR = ("Withdraw", "Report")  # `leave` and `evaluate --report`, which say what they send
METADATA = {
    "format": "one LoRA adapter",
    "dtype": "in float16",
    "job": "",
    "base": "fingerprints of base model",
    "tokenizer": "tokenizer and chat template",
    "chat_template": "chat template",
    "num_examples": "the numbers of examples",
    "num_tokens": "target tokens",
    "steps": "and steps",
    "train_loss": "the mean loss of the last epoch",
}


def shown() -> str:
    """What is said to a person of a job."""
    machine = pb.Machine(platform="Linux arm64", backend="torch", device="cuda")
    spec = pb.JobSpec(name="notes", lora=pb.LoraSpec(rank=8), upload=pb.UploadSpec(dtype="float16"))
    request = pb.JoinRequest(job="notes", client_name="vera", machine=machine)
    terms = consent.terms(pb.Job(spec=spec), request, "")
    return f"{terms.to_join} {terms.meanwhile} {terms.at_last}"


def messages(kind: Descriptor) -> Iterator[Descriptor]:
    yield kind
    for field in kind.fields:
        if field.message_type is not None:
            yield from messages(field.message_type)


def test_every_field_that_is_sent_is_said() -> None:
    calls = pb.DESCRIPTOR.services_by_name["Federation"].methods_by_name
    sent = [kind for name, call in calls.items() if name not in ASKED_FOR for kind in messages(call.input_type)]
    assert {kind.name for kind in sent} == SAID.keys()
    for kind in sent:
        assert {field.name for field in kind.fields} == SAID[kind.name].keys(), kind.name
        for name, words in SAID[kind.name].items():
            assert words is None or words in shown(), f"{kind.name}.{name}"


async def test_everything_in_the_adapters_file_is_said(tmp_path: Path) -> None:
    who = participant(tmp_path, FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(job.parse(SPEC))
        await take_part(address, who)
    _, metadata = tensors.read(outbox.find(who.state, "notes").adapter)
    assert metadata.keys() == METADATA.keys()
    assert all(words in shown() for words in METADATA.values())


def test_a_job_that_goes_on_from_another_says_so(tmp_path: Path) -> None:
    for start, words in (
        ("", ""),
        ("round-1", ", going on from round-1"),
        ("/srv/a", ", going on from an earlier adapter"),
    ):
        offered = pb.Job(spec=pb.JobSpec(name="notes", lora=pb.LoraSpec(rank=8, start_from=start)))
        assert consent.requirements(offered, pb.Machine(), tmp_path, None).trains.endswith(f"tokens{words}")


def status(name: str, *, opened: bool = True) -> pb.JobStatus:
    return pb.JobStatus(spec=pb.JobSpec(name=name), takes_contributions=opened)


def test_which_job_is_meant() -> None:
    open_one, closed = status("a"), status("b", opened=False)
    assert consent.choose_job([closed, open_one], "") == open_one
    assert consent.choose_job([closed, open_one], "b") == closed
    with pytest.raises(NotFound, match="there is no job 'c'"):
        consent.choose_job([closed, open_one], "c")
    with pytest.raises(Refused, match="no job is open"):
        consent.choose_job([closed], "")
    with pytest.raises(Refused, match="several jobs are open here: a, c"):
        consent.choose_job([status("c"), open_one], "")


def test_an_answer_holds_for_what_was_shown_and_for_nothing_else(tmp_path: Path) -> None:
    box = outbox.Outbox(tmp_path)
    spec = pb.JobSpec(name="notes", lora=pb.LoraSpec(rank=8))
    known, request = pb.Job(spec=spec, id="1"), pb.JoinRequest(client_name="vera")
    agreed = consent.terms(known, request, "ab" * 32)
    assert not consent.agreed_before([box], agreed)
    box.keep_consent(agreed.digest)
    assert consent.agreed_before([box], consent.terms(known, request, "ab" * 32))
    assert not consent.agreed_before([box], consent.terms(known, request, "cd" * 32))
    assert not consent.agreed_before([box], consent.terms(known, pb.JoinRequest(client_name="vera's other"), "ab" * 32))
    assert not consent.agreed_before([box], consent.terms(pb.Job(spec=spec, id="2"), request, "ab" * 32))
    assert not consent.agreed_before(
        [box], consent.terms(pb.Job(spec=spec, id="1", deadline_unix=1.0), request, "ab" * 32)
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "job.toml").write_text(JOB)
    (folder / "notes.txt").write_text("for line in file:\n    print(line)\n" * 800)
    with commands.coordinator(folder / "coordinator") as address:
        commands.run("coordinator", "submit", folder / "job.toml", "--state", folder / "coordinator")
        yield folder, address


def clients(folder: Path) -> list[str]:
    """Who the coordinator knows."""
    out, _ = commands.run("coordinator", "show", "notes", "--state", folder / "coordinator", "--json")
    return [client["name"] for client in json.loads(out).get("clients", [])]


def test_a_script_has_to_agree_in_advance(served: tuple[Path, str]) -> None:
    folder, address = served
    joins = ("join", "--server", address, "--data", folder / "notes.txt", "--state", folder / "script")
    out, err = commands.run("edge-client", *joins, "--name", "script", "--json", code=2)
    assert "add --yes" in err and "script" not in clients(folder)
    said = commands.events(out)["terms"]
    assert said["job"] == "notes" and "the name 'script'" in said["to_join"] and said["server"] == address


def joins(served: tuple[Path, str]) -> tuple[object, ...]:
    folder, address = served
    common = ("--backend", usable[-1], "--name", "vera", "--save-every", "0")
    return ("join", "--server", address, "--data", folder / "notes.txt", "--state", folder / "person", *common)


def test_who_says_no_leaves_no_trace(served: tuple[Path, str]) -> None:
    folder, address = served
    for keys, code, says in (("n\n", 3, "Nothing was sent"), ("\x03", 130, "To go on:")):  # the latter is Ctrl-C
        with terminal.running("edge-client", *joins(served), columns=60) as screen:
            if code == 3:
                screen.expect("Is it the same there?")
                screen.type("y\n")
            screen.expect("Take part, and send this? [y/N]")
            assert f"at      {address}" in screen.text and "the name 'vera'" in screen.text
            screen.type(keys)
            assert says in screen.finish(code=code)
    assert "vera" not in clients(folder)


def test_a_person_is_asked_once_and_may_go_on_later(served: tuple[Path, str]) -> None:
    folder, address = served
    with terminal.running("edge-client", *joins(served), columns=300) as screen:
        screen.expect("Take part, and send this? [y/N]")
        screen.type("y\n")
        screen.expect("bytes and a header, once")
        screen.expect("tokens/s")
        screen.type("\x03")
        assert f"To go on:\n  edge-client join --server {address} --data {folder}" in screen.finish(code=130)
    assert "vera" in clients(folder)
    with terminal.running("edge-client", *joins(served)) as screen:
        screen.expect("Training goes on after step")
        assert "Take part" not in screen.text
        screen.type("\x03")
        screen.finish(code=130)
