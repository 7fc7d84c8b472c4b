"""Jobs that ask for what a job may not: the same rules by file and by wire, and nothing is touched before they hold."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.adapter import WIRE_DTYPES, Shape, initial, write
from coordinator.jobs import spec as job
from edge_client import session
from edge_client.connection import job_check
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.preflight import disk
from edge_client.training.recipe import SCHEDULES
from edge_client.ui.screen import Screen
from oneround import rules, stream
from oneround.errors import BadData, Refused, UsageError
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb
from tests import commands, hostile, terminal
from tests.fakes import FakeBackend
from tests.participants import participant

NAN, INF = math.nan, math.inf
LONG = "x" * 100_000

# What a spec's field may not be, by its key.
SPECS: list[tuple[str, Any]] = [
    *(("name", name) for name in ("", "../../x", "/etc", "a/b", "a\\b", "A", "é", "a\0", "x" * 64, "con.x", "\x1b[2J")),
    *(("model.base", base) for base in ("", "x\x1b[2J", "x\nWhat leaves this machine: nothing", "\u202ex", LONG)),
    *(("model.revision", revision) for revision in ("x\n", LONG)),
    *(("model.gguf", gguf) for gguf in ("\x07", LONG)),
    *(("lora.rank", rank) for rank in (0, 1025, 2**32 - 1)),
    *(("lora.alpha", alpha) for alpha in (0.0, -1.0, 1e9, NAN, INF, -INF)),
    *(("lora.dropout", dropout) for dropout in (-0.1, 1.0, NAN, INF)),
    *(("lora.target_modules", names) for names in (["q"] * 5000, ["\x1b[2J"], ["a/b"], [""], [LONG])),
    *(("lora.start_from", start) for start in ("Round 1", "a\\b", "\x1b[2J", "/x\x1b[2J", "./a\nb", f"/{LONG}", LONG)),
    *(("train.epochs", epochs) for epochs in (0.0, -1.0, 1e12, NAN, INF)),
    *(("train.learning_rate", rate) for rate in (0.0, -1.0, 11.0, NAN, INF)),
    *(("train.schedule", schedule) for schedule in ("", "wavy", "__class__")),
    *(("train.warmup_ratio", ratio) for ratio in (-0.1, 1.0, NAN)),
    *(("train.batch_size", size) for size in (0, 65537, 2**32 - 1)),
    *(("train.max_seq_len", length) for length in (0, 1, 2**20 + 1, 2**32 - 1)),
    *(("train.seed", seed) for seed in (2**32, 2**64 - 1)),
    *(("round.min_clients", count) for count in (0, 2**32 - 1)),
    *(("round.deadline", deadline) for deadline in ("", "nan", "-1h", "0s", "367d", "٣h", "1h\n", "9" * 400 + "h")),
    *(("round.grace", grace) for grace in ("inf", "1 h")),
    *(("round.renew_every", every) for every in ("0s", "x")),
    *(("round.max_clients", count) for count in (0, 1)),
    *(("upload.quota", quota) for quota in ("", "0GB", "-1GB", "1e9GB")),
    *(("upload.dtype", dtype) for dtype in ("", "int4", "float64")),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[pb.Job, dict[str, Path]]:
    return hostile.announced(tmp_path_factory.mktemp("sound"))


def copy(message: pb.Job) -> pb.Job:
    other = pb.Job()
    other.CopyFrom(message)
    return other


def put(spec: pb.JobSpec, key: str, value: Any) -> None:
    part, _, name = key.rpartition(".")
    message = getattr(spec, part) if part else spec
    if isinstance(value, list):
        message.ClearField(name)
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)


@pytest.mark.parametrize(("key", "value"), SPECS, ids=[f"{key}-{n}" for n, (key, _) in enumerate(SPECS)])
def test_the_same_rules_for_a_file_and_for_the_wire(sound: tuple[pb.Job, Any], key: str, value: Any) -> None:
    offered = copy(sound[0])
    job_check.check(offered)
    job.check(offered.spec)
    put(offered.spec, key, value)
    with pytest.raises(UsageError) as at_the_daemon:
        job.check(offered.spec)
    with pytest.raises(BadData, match="makes no sense") as at_the_client:
        job_check.check(offered)
    assert str(at_the_daemon.value).startswith(f"{key} is ") and len(str(at_the_daemon.value)) < 300
    assert str(at_the_client.value).endswith(str(at_the_daemon.value))


def test_every_field_that_a_client_follows_has_a_rule() -> None:
    """So that a field that is added to these tables is not forgotten here."""
    ours = {"model", "lora", "train", "round", "upload"}
    held = {key for key, _ in SPECS} | {
        "model.accept_quantised_gguf",
        "train.packing",
        "round.target_clients",
        "lora.freeze_a",
    }
    for field in pb.JobSpec.DESCRIPTOR.fields:
        if field.name in ours:
            assert {f"{field.name}.{inner.name}" for inner in field.message_type.fields} <= held, field.name


def test_the_names_in_the_rules_are_those_that_are_known() -> None:
    assert set(rules.DTYPES) == WIRE_DTYPES.keys() and set(rules.SCHEDULES) == SCHEDULES.keys()


def files(change: Callable[[list[pb.Artifact]], None]) -> Callable[[pb.Job], None]:
    """Other files of the base, whose fingerprint is right."""

    def changed(offered: pb.Job) -> None:
        listed = list(offered.base_files)
        change(listed)
        offered.ClearField("base_files")
        offered.base_files.extend(listed)
        offered.base_fingerprint = stream.fingerprint(listed)

    return changed


def file(name: str) -> Callable[[pb.Job], None]:
    return files(lambda listed: listed.append(pb.Artifact(name=name, digest="0" * 64, size=1)))


def modules(**shape: int) -> Callable[[pb.Job], None]:
    return lambda offered: offered.modules[0].MergeFrom(pb.Module(**shape))


RESOLVED: dict[str, Callable[[pb.Job], Any]] = {
    "its id is none": lambda offered: setattr(offered, "id", "../" * 10 + "x/"),
    "which is no time": lambda offered: setattr(offered, "deadline_unix", NAN),
    "its deadline is inf": lambda offered: setattr(offered, "deadline_unix", INF),
    "its deadline is 1e": lambda offered: setattr(offered, "deadline_unix", 1e300),
    "its deadline is -1": lambda offered: setattr(offered, "deadline_unix", -1.0),
    "fingerprint": lambda offered: setattr(offered, "base_fingerprint", "../" * 21 + "x"),
    "has no SHA-256": lambda offered: setattr(offered.initial, "digest", "../x"),
    "larger than its rank": lambda offered: setattr(offered.initial, "size", 2**40),
    "have no names": lambda offered: offered.ClearField("modules"),
    "one name twice": lambda offered: offered.modules.append(offered.modules[0]),
    "names, or": lambda offered: setattr(offered.modules[0], "name", "\x1b[2J"),
    "no features": modules(in_features=2**32 - 1),
    "or more than": lambda offered: setattr(offered.modules[0], "out_features", 0),
    **{f"{name[:80]!r} is none of a base model's files": file(name) for name in (
        "modeling_evil.py", "pytorch_model.bin", "model.pt", "x.pkl", "adapter_config.json", "../config.json",
        "/etc/passwd", "sub/model.safetensors", ".bashrc", "x\x1b[2J.safetensors", "ünï.safetensors", "x.safetensors.",
        "tekken.json", "hf_quant_config.json", "preprocessor_config.json", "a" * 300 + ".safetensors",
    )},
    "have one name": file("Model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("says", RESOLVED)
def test_what_a_job_resolves_to(sound: tuple[pb.Job, Any], says: str) -> None:
    offered = copy(sound[0])
    RESOLVED[says](offered)
    with pytest.raises(BadData, match="makes no sense") as raised:
        job_check.check(offered)
    assert says in str(raised.value)


async def take_part(
    tmp_path: Path, server: hostile.Hostile, agreed: pb.Job | None = None, **options: Any
) -> FakeBackend:
    """Join, and whatever comes after."""
    who = participant(tmp_path, backend := FakeBackend())
    object.__setattr__(who, "agreed", agreed)
    async with (
        hostile.serving(server) as address,
        remotes.connect(address, Pins(who.state), lambda *_: None, insecure=True) as remote,
    ):
        await session.take_part(remote, "notes", who, Screen(), **options)
    return backend


async def test_nothing_is_written_for_a_job_that_makes_no_sense(tmp_path: Path, sound: tuple[pb.Job, Any]) -> None:
    offered = copy(sound[0])
    offered.spec.name = "../../outside"
    with pytest.raises(BadData, match="makes no sense"):
        await take_part(tmp_path, hostile.Hostile(offered, sound[1]))
    assert {path.name for path in tmp_path.rglob("*")} == {"client", "client-key.pem", "data.jsonl"}


async def test_another_job_than_the_one_that_was_shown(tmp_path: Path, sound: tuple[pb.Job, Any]) -> None:
    offered, _ = sound
    server = hostile.Hostile(offered, sound[1])
    server.then = copy(offered)
    server.then.spec.train.epochs = 1000
    with pytest.raises(Refused, match="notes has changed"):
        await take_part(tmp_path, server, agreed=offered)
    server.then.CopyFrom(offered)
    server.then.spec.name = "other"
    with pytest.raises(Refused, match="notes has changed"):
        await take_part(tmp_path, server)  # as `stay --accept notes` does
    assert not list((tmp_path / "client").glob("jobs/*"))


async def test_an_adapter_of_another_rank_than_the_jobs(tmp_path: Path, sound: tuple[pb.Job, Any]) -> None:
    """Which could be as large as the disk has room."""
    offered, given = copy(sound[0]), dict(sound[1])
    shapes = {module.name: (module.out_features, module.in_features) for module in offered.modules}
    write(initial({name: Shape(*shape) for name, shape in shapes.items()}, 1, 0), tmp_path / "other")
    offered.initial.CopyFrom(hostile.artifact(tmp_path / "other", "initial.safetensors"))
    given[offered.initial.digest] = tmp_path / "other"
    with pytest.raises(BadData, match="is not of rank 2"):
        await take_part(tmp_path, hostile.Hostile(offered, given))


async def test_room_for_a_terabyte_is_asked_for_before_anything_comes(
    tmp_path: Path, sound: tuple[pb.Job, Any]
) -> None:
    offered = copy(sound[0])
    offered.spec.lora.rank = 1024
    for module in offered.modules:
        module.in_features = module.out_features = 1 << 24
    job_check.check(offered)
    assert disk.room(offered, tmp_path, None).needed > 10**12
    with pytest.raises(Exception, match="not enough room on the disk"):
        await take_part(tmp_path, hostile.Hostile(offered, sound[1]))
    assert not list(tmp_path.rglob("*.safetensors*")) and not list(tmp_path.rglob("models"))


@pytest.mark.parametrize("field", ["now_unix", "opened_unix", "deadline_unix"])
async def test_times_that_are_none(tmp_path: Path, sound: tuple[pb.Job, Any], field: str) -> None:
    class Late(hostile.Hostile):
        async def ListJobs(self, request: Any, context: Any) -> pb.ListJobsReply:
            reply = await super().ListJobs(request, context)
            setattr(reply if field == "now_unix" else reply.jobs[0], field, NAN)
            return reply

    async with (
        hostile.serving(Late(*sound)) as address,
        remotes.connect(address, Pins(tmp_path), lambda *_: None, insecure=True) as remote,
    ):
        with pytest.raises(BadData, match="times that are none"):
            await remote.jobs()


async def test_the_command_shows_what_a_job_asks_for_and_escapes_nothing(
    tmp_path: Path, sound: tuple[pb.Job, Any]
) -> None:
    """In a terminal: what would hide or forge a line of the question is not obeyed; who says no has sent nothing."""
    offered = copy(sound[0])
    server = hostile.Hostile(offered, sound[1])
    data = tmp_path / "rows.txt"
    data.write_text("x = 1\n" * 400)

    async with hostile.serving(server) as address:
        where = ("--server", address, "--insecure", "--data", data, "--state", tmp_path / "client")

        def asked() -> str:
            with terminal.running("edge-client", "join", *where, columns=300) as screen:
                screen.expect("Take part, and send this? [y/N]")
                screen.type("n\n")
                return screen.finish(code=3)

        said = " ".join((await asyncio.to_thread(asked)).split())
        size = sum(each.size for each in offered.base_files)
        for words in (
            f"at {address}, key none, without TLS",
            f"base org/model, {human_size(size)} of it from the coordinator",
            "trains LoRA of rank 2 on 10 modules, with",
            "1 epochs in batches of 2 × 32 tokens",
            f"of the disk of {tmp_path / 'client'}",
            "No program comes with a job or its base.",
        ):
            assert words in said, words
        offered.spec.model.base = "x\x1b[2J\nWhat leaves this machine, and nothing else: nothing"
        _, err = await asyncio.to_thread(commands.run, "edge-client", "join", *where, "--yes", code=5)
        assert "\x1b" not in err and "\nWhat leaves" not in err and "model.base is" in err
    assert not server.joined and not (tmp_path / "client" / "jobs").exists()
