"""Receipts and manifests: whose word they are, what they prove once the coordinator is gone, and what is no proof."""

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import typer
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format

from converters.adapter import Adapter, LowRank
from coordinator.auth import identity
from coordinator.daemon import Daemon
from coordinator.jobs import spec
from coordinator.rpc import server
from edge_client import outbox, session
from edge_client.cli import app
from edge_client.cli import receipts as receipt_cli
from edge_client.connection import identity as clients
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.connection.remote import OnBytes, Remote
from edge_client.proofs import manifests, receipts
from edge_client.ui.screen import Screen
from oneround import signing, statements, stream, tls
from oneround.errors import BadData, Refused, UsageError
from oneround.manifest import ContributionEntry, Manifest
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.clients import Crowd, connected, me
from tests.daemons import BOB, SPEC, join, judged, nothing, running, trained, version, written
from tests.fakes import FakeBackend
from tests.participants import contributed, participant

CAROL, EVE = "c" * 32, "e" * 32


@dataclass(frozen=True)
class Past:
    """What a round leaves: the coordinator's state folder, which nobody serves any more; Alice's; what she pulled; and
    the receipts of the others, in files."""

    coordinator: Path
    state: Path
    pulled: Path
    receipts: dict[str, Path]

    @property
    def key(self) -> signing.PrivateKey:
        return signing.private(identity.load_or_create(self.coordinator).key)

    @property
    def mine(self) -> Path:
        return outbox.find(self.state, "notes").receipt_file


async def contribute(remote: Crowd, folder: Path, client: str, *, sound: bool = True) -> Path:
    """One more client; returns its receipt."""
    reply = await join(remote, client)
    made = trained(reply, ord(client[0]))
    small = {name: LowRank(factors.a, factors.b * np.float32(0.05)) for name, factors in made.modules.items()}
    if not sound:
        small[reply.job.modules[0].name].b[0] = np.nan
    file, declaration = written(Adapter(small, made.metadata), folder / client[0])
    kept = folder / f"{client[0]}.json"
    kept.write_text(json_format.MessageToJson(await remote.upload(reply.lease, declaration, file, nothing)))
    await judged(remote, reply.lease)
    return kept


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    """Alice and Bob take part, Eve is quarantined, and Carol comes after the first version."""
    folder = tmp_path_factory.mktemp("past")
    kept = {}
    async with (
        running(folder / "coordinator") as (daemon, address),
        connected(address, folder) as remote,
    ):
        await daemon.operator.submit(spec.parse(SPEC))
        await contributed(address, folder)
        kept["bob"] = await contribute(remote, folder, BOB)
        kept["eve"] = await contribute(remote, folder, EVE, sound=False)
        await daemon.operator.publish(pb.PublishRequest(job="notes"))
        await version(daemon, 1, "notes")
        kept["carol"] = await contribute(remote, folder, CAROL)
        await asyncio.to_thread(
            commands.run, "edge-client", "pull", "notes", "--to", folder / "out", "--state", folder / "client"
        )
    return Past(folder / "coordinator", folder / "client", folder / "out", kept)


Says = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """`receipt verify`, and its events."""

    def verify(receipt: Path | str, state: Path, **options: Any) -> dict[str, dict[str, Any]]:
        capsys.readouterr()
        receipt_cli.verify(str(receipt), state=state, as_json=True, **options)
        return commands.events(capsys.readouterr().out)

    return verify


# ---- once the coordinator is gone ----


def test_a_receipt_is_checked_offline(past: Past, tmp_path: Path) -> None:
    own = outbox.find(past.state, "notes")
    verify = ("receipt", "verify", "notes", "--adapter", own.adapter, "--manifest", past.pulled / "manifest.json")
    shown, _ = commands.run("edge-client", *verify, "--state", past.state)
    assert "The receipt holds" in shown and "signed by  the coordinator at 127.0.0.1:" in shown
    assert "It is part of v1 of notes" in shown and "of the mean: admitted" in shown
    listed, _ = commands.run("edge-client", "receipt", "show", "--state", past.state)
    joined = own.joined()
    assert joined is not None
    assert str(own.receipt_file) in listed and joined.lease not in listed, "what a client speaks by stays secret"
    assert joined.lease not in own.receipt_file.read_text()

    shutil.copy(own.receipt_file, tmp_path / "given.json")  # to somebody who has never seen the coordinator
    given = ("receipt", "verify", tmp_path / "given.json", "--state", tmp_path, "--json")
    _, said = commands.run("edge-client", *given, code=5)
    assert "a key that this machine has not pinned" in said and "--fingerprint" in said


def test_whoever_is_told_the_key_can_check_a_receipt(past: Past, says: Says, tmp_path: Path) -> None:
    key = tls.grouped(identity.load_or_create(past.coordinator).fingerprint)
    for typed in (key, key.upper(), key.replace(" ", "")):
        assert says(past.mine, tmp_path, fingerprint=typed)["receipt_holds"]["by"] == "the given key"
    with pytest.raises(Refused, match="neither a receipt's file nor a job"):
        says("letters", tmp_path)


def test_what_is_part_of_a_publication_and_what_is_not(past: Past, says: Says) -> None:
    manifest = past.pulled / "manifest.json"
    said = {who: says(file, past.state, manifest=manifest) for who, file in past.receipts.items()}
    mine = says("notes", past.state, manifest=manifest)["takes_part"]
    assert mine["weight"] + said["bob"]["takes_part"]["weight"] == pytest.approx(1)
    assert "NaN" in said["eve"]["takes_no_part"]["why"] and said["eve"]["takes_no_part"]["version"] == 1
    assert "not among the 3 contributions" in said["carol"]["takes_no_part"]["why"]


def test_another_contribution_in_ones_place_is_not_ones_own() -> None:
    receipt = pb.Receipt(job="notes", job_id="1" * 32, client_id="a" * 32, digest="d" * 64)
    own, other = (
        ContributionEntry(client="x", id=letter * 12, digest=digest * 64, num_examples=1, weight=0.5)
        for letter, digest in (("a", "e"), ("b", "d"))  # the other's has the same bytes as the receipt is for
    )
    signed = Manifest(job={"name": "notes"}, job_id="1" * 32, version=1, contributions=[other, own])
    part = manifests.part(signed, receipt)
    assert part.weight == 0 and "another contribution of the same client" in part.why
    with pytest.raises(BadData, match="of another job"):
        manifests.part(Manifest(job={"name": "notes"}, job_id="2" * 32, version=1), receipt)


def test_the_receipt_of_another_adapter(past: Past, says: Says, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="for another adapter"):
        says(past.receipts["bob"], past.state, adapter=outbox.find(past.state, "notes").adapter)
    with pytest.raises(BadData, match="there is no adapter"):
        says("notes", past.state, adapter=tmp_path / "none.safetensors")


TAMPERED = {
    "job": "letters",
    "job_id": "0" * 32,
    "client_id": "0" * 32,
    "digest": "0" * 64,
    "size": 7,
    "received_unix": 1763748968.1,
}


def test_every_field_is_tampered_with() -> None:
    assert TAMPERED.keys() | {"signature"} == {field.name for field in pb.Receipt.DESCRIPTOR.fields}


@pytest.mark.parametrize("field", TAMPERED)
def test_a_tampered_receipt_holds_no_more(past: Past, says: Says, tmp_path: Path, field: str) -> None:
    receipt = receipts.read(past.mine)
    setattr(receipt, field, TAMPERED[field])
    with pytest.raises(BadData, match="the signature does not fit this receipt"):
        says(_file(tmp_path, receipt), past.state)


def test_a_re_signed_receipt_is_refused(past: Past, says: Says, tmp_path: Path) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    receipt = receipts.read(past.mine)
    receipt.received_unix -= 3600
    receipt.signature.CopyFrom(statements.sign(stranger, statements.receipt(receipt)))
    with pytest.raises(BadData, match="has not pinned"):
        says(_file(tmp_path, receipt), past.state)
    known = identity.load_or_create(past.coordinator).fingerprint
    with pytest.raises(BadData, match="another key than the given one"):
        says(_file(tmp_path, receipt), past.state, fingerprint=known)
    receipt.signature.key = signing.spki(past.key)  # the right key beside the wrong signature
    with pytest.raises(BadData, match="does not fit"):
        says(_file(tmp_path, receipt), past.state)
    receipt.ClearField("signature")
    with pytest.raises(BadData, match="is not signed"):
        says(_file(tmp_path, receipt), past.state)
    with pytest.raises(UsageError, match="64 hex digits"):
        says("notes", past.state, fingerprint="12 34")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 10_000,
        b"{" + b" " * 20_000 + b"}",
        b"{}",
        b'{"client_id": "x"}',
        b'{"signature": {"key": 3}}',
        b'{"received_unix": "NaN"}',
        b'{"size": -1}',
        b'{"job": "a", "job": "b"}',
        b'{"job": "../../x"}',
        None,
    ],
)
def test_files_that_are_no_receipt(past: Past, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "receipt.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(BadData):
        receipts.read(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job", "../../x"),
        ("client_id", "\x1b[2J"),
        ("received_unix", float("nan")),
        ("received_unix", 1e300),
        ("size", 0),
    ],
)
def test_receipts_of_what_cannot_be(past: Past, tmp_path: Path, field: str, value: object) -> None:
    receipt = receipts.read(past.mine)
    setattr(receipt, field, value)
    with pytest.raises(BadData, match="cannot be"):
        receipts.read(_file(tmp_path, receipt))


def test_a_manifest_with_a_contribution_taken_out(past: Past, says: Says, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    with pytest.raises(BadData, match="cannot be read"):
        says("notes", past.state, manifest=manifest)
    values = json.loads((past.pulled / "manifest.json").read_text())
    mine = receipts.read(past.mine)
    values["contributions"] = [given for given in values["contributions"] if given["digest"] != mine.digest]
    manifest.write_text(json.dumps(values, indent=2))
    with pytest.raises(BadData, match="there is no signature beside"):
        says("notes", past.state, manifest=manifest)
    shutil.copy(past.pulled / "manifest.json.signature", tmp_path)
    with pytest.raises(BadData, match="the signature does not fit"):
        says("notes", past.state, manifest=manifest)

    stranger = ec.generate_private_key(ec.SECP256R1())
    _sign(manifest, stranger)
    with pytest.raises(BadData, match="has not pinned"):
        says("notes", past.state, manifest=manifest)
    # Another coordinator that this machine knows has no say in it either.
    state = tmp_path / "state"
    shutil.copytree(past.state, state)
    Pins(state).pin("elsewhere:50051", signing.fingerprint(signing.spki(stranger)))
    with pytest.raises(BadData, match="by another coordinator than the receipt"):
        says("notes", state, manifest=manifest)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "[" * 10_000,
        '{"job": {"name": "n"}, "job_id": "1", "version": 1, "contributions": [3]}',
        '{"job": {"name": "n"}, "job_id": "1", "version": 1, "files": {"a": 1}}',
        '{"job": {"name": "n"}, "job_id": "1", "version": 1, "contributions": [{"id": "1"}]}',
    ],
)
def test_what_a_coordinator_signed_and_is_no_manifest(tmp_path: Path, content: str) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(content)
    _sign(manifest, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(BadData):
        manifests.open_signed(manifest)


# ---- the moment a receipt comes ----


class Doctored(Remote):
    """A coordinator's answers, with its receipts changed on the way."""

    def __init__(self, remote: Remote, change: Callable[[pb.Receipt], None]) -> None:
        super().__init__(remote.connection, remote.me)
        self.change = change

    async def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        reply = await super().join(request)
        if reply.HasField("receipt"):
            self.change(reply.receipt)
        return reply

    async def upload(self, lease: str, declaration: pb.Declaration, file: Path, on_bytes: OnBytes) -> pb.Receipt:
        receipt = await super().upload(lease, declaration, file, on_bytes)
        self.change(receipt)
        return receipt


def _signed(key: signing.PrivateKey, **changes: str) -> Callable[[pb.Receipt], None]:
    def change(receipt: pb.Receipt) -> None:
        for field, value in changes.items():
            setattr(receipt, field, value)
        receipt.signature.CopyFrom(statements.sign(key, statements.receipt(receipt)))

    return change


async def test_a_wrong_receipt_is_none_and_the_adapter_stays(tmp_path: Path) -> None:
    """Whether it comes after the upload, or to one who joins again. Nothing is trained twice."""
    who = participant(tmp_path, backend := FakeBackend())

    async def take_part(address: str, change: Callable[[pb.Receipt], None]) -> pb.Receipt:
        async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
            return await session.take_part(Doctored(remote, change), "notes", who, Screen())

    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse(SPEC))
        key = signing.private(identity.load_or_create(tmp_path / "one").key)
        wrong = {
            "does not fit": lambda receipt: setattr(receipt, "size", 7),
            "is not signed": lambda receipt: receipt.ClearField("signature"),
            "by another key": _signed(ec.generate_private_key(ec.SECP256R1())),
            "another client": _signed(key, client_id=me(BOB).client_id),
            "another adapter": _signed(key, digest="0" * 64),
            "another job": _signed(key, job_id="0" * 32),
        }
        for fault, change in wrong.items():
            with pytest.raises(BadData, match=f"no receipt: .*{fault}.*The adapter stays here"):
                await take_part(address, change)
            (box,) = outbox.all_outboxes(who.state)
            assert box.receipt() is None and box.trained() is not None and box.adapter.exists()
        receipt = await take_part(address, lambda _: None)
        assert box.receipt() == receipt and receipt.client_id == clients.me(who.state).client_id
    assert backend.runs == 1


def test_without_tls_any_key_may_have_signed_a_receipt_that_is_right() -> None:
    mine, other = "a" * 32, "b" * 32
    announced = pb.Job(spec=pb.JobSpec(name="notes"), id="1" * 32)
    receipt = pb.Receipt(job="notes", job_id="1" * 32, client_id=mine, digest="d" * 64, size=7)
    _signed(ec.generate_private_key(ec.SECP256R1()))(receipt)
    assert receipts.accept(receipt, announced, mine, "d" * 64, b"") == receipt
    assert receipts.accept(receipt, announced, mine, "", b"") == receipt, "what was sent may be gone from here"
    for client, digest, why in ((other, "d" * 64, "another client"), (mine, "e" * 64, "another adapter")):
        with pytest.raises(BadData, match=why):
            receipts.accept(receipt, announced, client, digest, b"")


# ---- pull ----


@pytest.fixture
def served(past: Past, tmp_path: Path) -> Path:
    """A copy of the coordinator's state, to be tampered with."""
    shutil.copytree(past.coordinator, tmp_path / "coordinator")
    return tmp_path / "coordinator"


async def pulled(state: Path, folder: Path, *options: str) -> None:
    """Serve a state folder, and pull from it as the command does."""
    insecure = "--insecure" in options
    daemon, who = Daemon(state), identity.load_or_create(state)
    grpc_server, address = server.create(daemon, who, "127.0.0.1:0", insecure=insecure)
    await grpc_server.start()
    try:
        given = [
            "pull",
            "notes",
            "--to",
            folder,
            "--state",
            folder / "state",
            "--server",
            address,
            "--json",
            *options,
        ]
        command = typer.main.get_command(app.app)
        await asyncio.to_thread(command.main, list(map(str, given)), standalone_mode=False)
    finally:
        await grpc_server.stop(None)
        daemon.release()


@contextmanager
def row(state: Path) -> Iterator[pb.Publication]:
    """What the coordinator's database has of the first version, to be changed."""
    with closing(sqlite3.connect(state / "coordinator.sqlite")) as database:
        (text,) = database.execute("select publication from publications").fetchone()
        made = json_format.Parse(text, pb.Publication())
        yield made
        changed = (json_format.MessageToJson(made), made.version)
        database.execute("update publications set publication = ?, version = ?", changed)
        database.commit()


def _announce(state: Path, *names: str) -> None:
    """Have the database announce files as they stand now."""
    with row(state) as made:
        for artifact in made.artifacts:
            if artifact.name in names:
                file = state / "publications" / "notes" / "v1" / artifact.name
                artifact.digest, artifact.size = stream.digest(file), file.stat().st_size


def _other_model(state: Path) -> None:
    file = state / "publications" / "notes" / "v1" / "notes-f16.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def _model(state: Path) -> None:
    _other_model(state)
    _announce(state, "notes-f16.gguf")


def _model_and_manifest(state: Path) -> None:
    """All but the signature fits together."""
    _other_model(state)
    folder = state / "publications" / "notes" / "v1"
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["notes-f16.gguf"]["sha256"] = stream.digest(folder / "notes-f16.gguf")
    (folder / "manifest.json").write_text(json.dumps(values, indent=2))
    _announce(state, "notes-f16.gguf", "manifest.json")


def _re_signed(state: Path) -> None:
    _model_and_manifest(state)
    _sign(state / "publications" / "notes" / "v1" / "manifest.json", ec.generate_private_key(ec.SECP256R1()))
    _announce(state, "manifest.json.signature")


def _twice(state: Path) -> None:
    """The right file and a wrong one, under one name."""
    with row(state) as made:
        (right,) = [artifact for artifact in made.artifacts if artifact.name == "notes-f16.gguf"]
        made.artifacts.insert(0, pb.Artifact(name="notes-f16.gguf", digest="0" * 64, size=right.size))


def _one_more(state: Path) -> None:
    with row(state) as made:
        made.artifacts.append(pb.Artifact(name="more-f32.gguf", digest="0" * 64, size=1))


def _another_version(state: Path) -> None:
    """The first version, once more as the second."""
    with row(state) as made:
        made.version = 2
    folder = state / "publications" / "notes"
    (folder / "v1").rename(folder / "v2")


def _enormous(state: Path) -> None:
    with row(state) as made:
        made.artifacts[0].size = 1 << 40


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (_other_model, "came damaged"),
        (_model, "is not as it was signed: notes-f16.gguf"),
        (_model_and_manifest, "the signature does not fit"),
        (_re_signed, "signed with another key than this coordinator's"),
        (_twice, "two files of one name"),
        (_one_more, "is not as it was signed: more-f32.gguf"),
        (_another_version, "is that of v1 of notes"),
        (_enormous, "which it never has"),
    ],
)
async def test_what_was_tampered_with_is_not_pulled(
    served: Path, tmp_path: Path, tamper: Callable[[Path], None], says: str
) -> None:
    tamper(served)
    with pytest.raises(BadData, match=says):
        await pulled(served, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf"))


async def test_what_nobody_signed_is_taken_only_by_who_asks_for_it(served: Path, tmp_path: Path) -> None:
    with row(served) as made:
        (signature,) = [artifact for artifact in made.artifacts if artifact.name == "manifest.json.signature"]
        made.artifacts.remove(signature)
    with pytest.raises(Refused, match="is not signed") as caught:
        await pulled(served, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert "coordinator publish notes" in caught.value.hint and "--unsigned" in caught.value.hint
    await pulled(served, tmp_path / "out", "--unsigned")
    assert (tmp_path / "out" / "notes-f16.gguf").exists()


async def test_a_manifest_of_something_else_is_left_alone(served: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="of something else"):
        await pulled(served, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "{}" and not list(tmp_path.glob("*.gguf"))
    await pulled(served, tmp_path / "out")
    await pulled(served, tmp_path / "out")  # its own it may replace


async def test_without_tls_a_signature_holds_the_files_together(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await pulled(served, tmp_path / "out", "--insecure")
    assert '"signed_by_anyone"' in capsys.readouterr().out and (tmp_path / "out" / "notes-f16.gguf").exists()
    _model(served)
    with pytest.raises(BadData, match="is not as it was signed"):
        await pulled(served, tmp_path / "again", "--insecure")


async def test_after_a_change_of_keys(past: Past, served: Path, says: Says, tmp_path: Path) -> None:
    """What the old key signed holds for whoever knows it, and the new one signs receipts anew."""
    before = identity.load_or_create(served).fingerprint
    for name in ("key.pem", "certificate.pem"):
        (served / name).unlink()
    with pytest.raises(BadData, match="signed with another key") as caught:
        await pulled(served, tmp_path / "out")
    assert "coordinator publish notes" in caught.value.hint

    async with (
        running(served) as (_, address),
        remotes.connect(address, Pins(tmp_path), lambda *_: None, me=clients.me(past.state)) as remote,
    ):
        receipt = (await remote.join(pb.JoinRequest(job="notes"))).receipt
    assert receipts.signer(receipt) == identity.load_or_create(served).fingerprint != before
    assert statements.receipt(receipt) == statements.receipt(receipts.read(past.mine)), "the same words"
    manifest = past.pulled / "manifest.json"
    assert "takes_part" in says(past.mine, tmp_path / "none", manifest=manifest, fingerprint=before)


async def test_after_a_planned_change_of_keys(served: Path, tmp_path: Path) -> None:
    """The new key vouches for what the one before it has signed, to those who never saw that one too."""
    before, after = identity.rotate(served)
    assert before != after
    await pulled(served, tmp_path / "out")
    assert (tmp_path / "out" / "notes-f16.gguf").exists()


def _sign(manifest: Path, key: signing.PrivateKey) -> None:
    signature = statements.sign(key, statements.manifest(stream.digest(manifest)))
    manifest.with_name("manifest.json.signature").write_text(json_format.MessageToJson(signature))


def _file(folder: Path, receipt: pb.Receipt) -> Path:
    file = folder / "receipt.json"
    file.write_text(json_format.MessageToJson(receipt, preserving_proto_field_name=True))
    return file
