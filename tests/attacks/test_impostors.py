"""Others in a coordinator's place: on its address, on its network, and between it and its clients."""

import asyncio
import datetime
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import pytest

from coordinator import discovery
from coordinator.auth import certificates, identity
from coordinator.auth.identity import Identity, OwnFiles
from coordinator.cli import client as control
from coordinator.jobs import spec
from coordinator.rpc import transport
from edge_client.connection import connect as reach
from edge_client.connection.identity import Pin, Pins
from edge_client.connection.remote import Remote, connect
from edge_client.connection.target import Target
from edge_client.connection.tls_probe import ClientCertificate
from oneround import signing, tls
from oneround.errors import Refused, Unreachable, UsageError
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc
from tests import authorities, commands
from tests.daemons import SPEC, running
from tests.fakes import RecordingScreen
from tests.network import Relay
from tests.waiting import LONG


async def met(address: str, state: Path, own: ClientCertificate | None = None, *, insecure: bool = False) -> str:
    """Connect, ask for the jobs, and give the key that was met."""
    async with connect(address, Pins(state), lambda _: None, own=own, insecure=insecure) as remote:
        await remote.jobs()
        return remote.fingerprint


@asynccontextmanager
async def roaming(address: str, state: Path, screen: RecordingScreen) -> AsyncIterator[Remote]:
    async with reach.connected(Target(address), state, screen) as remote:
        await remote.jobs()
        yield remote


async def again(remote: Remote, wire: Relay) -> None:
    """Lose the connection, and go on as `patience` does."""
    wire.cut()
    async with asyncio.timeout(LONG):
        while True:
            with suppress(Unreachable):
                await remote.jobs()
                return
            await remote.find_again(remote.server)
            await asyncio.sleep(0.1)


# ---- certificates that are renewed, keys that follow ----


@pytest.mark.parametrize("whose", ["own", "operator's"])
async def test_a_certificate_that_is_renewed_meanwhile(tmp_path: Path, whose: str) -> None:
    """The daemon shows the new one without a restart, and a client at work goes on: the key is the same."""
    state, key, ca = tmp_path / "state", authorities.pem(authorities.new_key()), authorities.authority("ca")
    files = OwnFiles(tmp_path / "tls.pem", tmp_path / "tls-key.pem") if whose != "own" else None

    def renew() -> None:
        if files is None:
            (state / "certificate.pem").unlink()
            return
        files.key.write_bytes(key)
        files.certificate.write_bytes(ca.signed(signing.private(key), ["host.example"]))  # type: ignore[arg-type]

    if files is not None:
        renew()
    load, screen = partial(identity.load_or_create, state, files), RecordingScreen()
    shown = transport.Certificates(load(), load, look_every=0)
    async with Relay() as wire, running(state, certificates=shown) as (_, wire.target):
        async with roaming(wire.address, tmp_path, screen) as remote:
            first, pinned = remote.certificate, Pins(tmp_path).all()
            assert pinned == {wire.address: load().fingerprint}
            renew()
            await again(remote, wire)
            assert remote.certificate != first and tls.fingerprint(remote.certificate) == tls.fingerprint(first)
            assert screen.times("moved") == screen.times("key_changed") == 0
            await again(remote, wire)
        assert await met(wire.address, tmp_path) == load().fingerprint and Pins(tmp_path).all() == pinned


async def test_renewed_files_that_cannot_be_used_change_nothing(tmp_path: Path) -> None:
    """A file that is half written, and one with another key, which clients would refuse."""
    state, key, ca = tmp_path / "state", authorities.new_key(), authorities.authority("ca")
    files = OwnFiles(tmp_path / "tls.pem", tmp_path / "tls-key.pem")

    def write(key: object, certificate: bytes) -> None:
        files.key.write_bytes(authorities.pem(key))  # type: ignore[arg-type]
        files.certificate.write_bytes(certificate)

    write(key, good := ca.signed(key, ["host.example"]))
    load = partial(identity.load_or_create, state, files)
    shown = transport.Certificates(first := load(), load, look_every=0)
    async with running(state, certificates=shown) as (_, address):
        other = authorities.new_key()
        for broken in ((key, good[:200]), (other, good), (other, ca.signed(other, ["host.example"]))):
            write(*broken)
            assert await met(address, tmp_path) == first.fingerprint


async def test_a_client_follows_a_key_that_was_changed(tmp_path: Path) -> None:
    """One that is at work, and one that was away for two changes; neither goes back to a key that was given up."""
    state, screen = tmp_path / "state", RecordingScreen()

    async with Relay() as wire, AsyncExitStack() as open_now:
        async with running(state) as (_, wire.target):
            old = await met(wire.address, tmp_path / "away")
            remote = await open_now.enter_async_context(roaming(wire.address, tmp_path / "at work", screen))
            stolen = identity.load_or_create(state)
        identity.rotate(state)
        async with running(state) as (_, wire.target):
            await again(remote, wire)
            (middle,) = Pins(tmp_path / "at work").by_address().values()
            assert middle == Pin(remote.fingerprint, (old,)) and old != remote.fingerprint
            said = dict(screen.said)["key_changed"]
            assert (said["before"], said["now"]) == (tls.grouped(old), tls.grouped(middle.fingerprint))
        identity.rotate(state)
        async with running(state) as (_, wire.target):
            last = await met(wire.address, tmp_path / "away")
            assert last == identity.load_or_create(state).fingerprint
            assert Pins(tmp_path / "away").by_address() == {wire.address: Pin(last, (old, middle.fingerprint))}
            assert await met(wire.target, tmp_path / "away") == last, "at an address that is new here"
        async with showing(tmp_path, stolen) as wire.target:
            for address in (wire.address, wire.target):  # nor where nothing is pinned
                with pytest.raises(Refused, match="gave up for another"):
                    await met(address, tmp_path / "away")


@asynccontextmanager
async def showing(folder: Path, who: Identity) -> AsyncIterator[str]:
    """A coordinator that shows what it is told to."""
    async with running(folder / "impostor", certificates=transport.Certificates(who)) as (_, address):
        yield address


def forged(key: bytes, changes: Sequence[tls.Change]) -> Identity:
    now = datetime.datetime.now(datetime.UTC)
    return Identity(key, certificates.self_signed(key, changes, now), "", b"")


async def test_a_key_that_claims_to_follow_the_pinned_one(tmp_path: Path) -> None:
    true, hostile = identity.load_or_create(tmp_path / "true"), authorities.new_key()
    mine, identity_of = signing.spki(hostile), tls.public_key(true.certificate)
    next_fingerprint = identity.rotate(tmp_path / "true")[1]
    (copied,) = tls.changes(identity.load_or_create(tmp_path / "true").certificate)
    claims = {
        "none": [],
        "signed by itself": [tls.Change(identity_of, tls.change(hostile, mine).signature)],
        "copied from the true one": [copied],
        "no signature": [tls.Change(identity_of, b"")],
    }

    async with Relay() as wire:
        Pins(tmp_path).pin(wire.address, true.fingerprint)
        for claim, changes in claims.items():
            async with showing(tmp_path, forged(authorities.pem(hostile), changes)) as wire.target:
                with pytest.raises(Refused, match="another key than the last time"):
                    await met(wire.address, tmp_path)
            assert Pins(tmp_path).by_address() == {wire.address: Pin(true.fingerprint)}, claim
        async with running(tmp_path / "true") as (_, wire.target):
            assert await met(wire.address, tmp_path) == next_fingerprint


async def test_a_client_at_work_does_not_go_on_with_another(tmp_path: Path) -> None:
    screen = RecordingScreen()
    async with Relay() as wire, running(tmp_path / "one") as (_, one), running(tmp_path / "two") as (_, two):
        wire.target = one
        async with roaming(wire.address, tmp_path / "client", screen) as remote:
            key = remote.fingerprint
            wire.target = two
            wire.cut()
            with pytest.raises(Unreachable):
                await remote.jobs()
            assert not await remote.find_again(wire.address)
            with pytest.raises(Unreachable):
                await remote.jobs()
            wire.target = one
            await again(remote, wire)
            assert remote.fingerprint == key and Pins(tmp_path / "client").all() == {wire.address: key}


# ---- on the network ----


@asynccontextmanager
async def advertised(address: str, fingerprint: str, name: str) -> AsyncIterator[None]:
    saying = asyncio.create_task(
        discovery.advertise("127.0.0.1", int(address.rpartition(":")[2]), fingerprint, name=name)
    )
    try:
        yield
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)


async def test_the_trusted_one_is_found_among_others(tmp_path: Path) -> None:
    """By its key, whoever else says the same name; and what says that key and has another is refused."""

    screen, client = RecordingScreen(), tmp_path / "client"
    async with running(tmp_path / "true") as (_, true), running(tmp_path / "hostile") as (_, hostile):
        key, other = (identity.load_or_create(tmp_path / name).fingerprint for name in ("true", "hostile"))
        async with (
            advertised(hostile, other, "ward"),
            advertised(true, key, "ward"),
            reach.connected(Target(trust=key), client, screen) as remote,
        ):
            assert (remote.server, remote.fingerprint) == (true, key)
        (client / "known-coordinators.json").unlink()
        async with advertised(hostile, key, "ward"):
            with pytest.raises(Refused, match="another key than you trust"):
                async with reach.connected(Target(trust=key), client, screen):
                    pass
        assert not Pins(client).all()


async def test_a_coordinator_that_has_moved_is_not_looked_for_at_an_impostors(tmp_path: Path) -> None:
    """The pinned key is said of two places: the hostile one is passed over."""

    screen, client = RecordingScreen(), tmp_path / "client"
    async with running(tmp_path / "true") as (_, true), running(tmp_path / "hostile") as (_, hostile):
        key = identity.load_or_create(tmp_path / "true").fingerprint
        Pins(client).pin("127.0.0.1:1", key)
        async with advertised(hostile, key, "a ward"):
            with pytest.raises(Unreachable):
                async with reach.connected(Target("127.0.0.1:1"), client, screen):
                    pass
            Pins(client).pin(true, key)
            async with reach.connected(Target("127.0.0.1:1"), client, screen) as remote:
                assert remote.server == true


# ---- without TLS, and with too much of it ----


async def test_no_downgrade(tmp_path: Path) -> None:
    async with running(tmp_path / "plain", insecure=True) as (_, address):
        with pytest.raises(Unreachable, match="without TLS, and nothing is said to it"):
            await met(address, tmp_path)
        assert not Pins(tmp_path).all() and await met(address, tmp_path, insecure=True) == ""
    async with running(tmp_path / "tls") as (_, address):
        with pytest.raises(Refused, match="speaks TLS"):
            await met(address, tmp_path, insecure=True)


async def test_mutual_tls(tmp_path: Path) -> None:
    """Clients of the CA get in; those of another, of none, and with an ended one do not. The operator always does."""
    ca, other, state = authorities.authority("ca"), authorities.authority("other"), tmp_path / "state"
    good, ended = ca.client(tmp_path / "good"), ca.client(tmp_path / "ended", days=-1)

    who = identity.load_or_create(state)
    shown = transport.Certificates(who, client_ca=ca.certificate)
    async with running(state, certificates=shown) as (_, address):
        assert await met(address, tmp_path, own=ClientCertificate(*good)) == who.fingerprint
        with pytest.raises(Refused, match="lets in only clients with a certificate") as caught:
            await met(address, tmp_path)
        assert "--certificate FILE" in caught.value.hint
        for wrong in (other.client(tmp_path), ended):
            with pytest.raises(Refused, match="does not take the certificate"):
                await met(address, tmp_path, own=ClientCertificate(*wrong))
        for broken, says in (
            (ClientCertificate(good[0], ended[1]), "no certificate and its key"),
            (ClientCertificate(*2 * [state]), "read"),
        ):
            with pytest.raises(UsageError, match=says):
                await met(address, tmp_path, own=broken)
        assert (await control.submit(state, spec.parse(SPEC))).spec.name == "notes"
        assert await control.jobs(state)
    async with running(state) as (_, address):
        assert await met(address, tmp_path, own=ClientCertificate(*good)) == who.fingerprint, (
            "one that nobody asked for"
        )


async def test_the_operators_calls_are_not_taken_from_the_network(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, address):
        who = identity.load_or_create(tmp_path)
        credentials = grpc.ssl_channel_credentials(who.certificate)
        right = [("authorization", f"Bearer {who.admin_token}")]
        name = [("grpc.ssl_target_name_override", tls.NAME)]
        async with grpc.aio.secure_channel(address, credentials, name) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc.AdminStub(channel).Show(pb.ShowRequest(job="notes"), metadata=right)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_ca_and_its_clients_from_the_command_line(tmp_path: Path) -> None:
    ca, key = authorities.authority("ca"), authorities.new_key()
    (tmp_path / "ca.pem").write_bytes(ca.certificate)
    (tmp_path / "tls.pem").write_bytes(ca.signed(key, ["127.0.0.1"]))
    (tmp_path / "tls-key.pem").write_bytes(authorities.pem(key))
    certificate, certificate_key = ca.client(tmp_path)
    options = ("--client-ca", tmp_path / "ca.pem", "--tls-certificate", tmp_path / "tls.pem")
    with commands.coordinator(tmp_path / "state", *options, "--tls-key", tmp_path / "tls-key.pem") as address:
        assert "serving" in commands.run("coordinator", "health", "--state", tmp_path / "state")[0]
        pulls = ("pull", "notes", "--server", address, "--state", tmp_path / "client")
        _, err = commands.run("edge-client", *pulls, code=3)
        assert "lets in only clients with a certificate" in err
        _, err = commands.run(
            "edge-client", *pulls, "--certificate", certificate, "--certificate-key", certificate_key, code=3
        )
        assert "no job" in err
    assert not (tmp_path / "state" / "key.pem").exists()
