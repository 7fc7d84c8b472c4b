"""Who would join, read or speak for others and may not: each is refused by the right status, and the log says so."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from structlog.testing import capture_logs

from coordinator.auth import identity
from coordinator.cli import client as control
from coordinator.daemon import Daemon
from coordinator.jobs import spec as job
from edge_client.connection import remote as remotes
from edge_client.connection.channel import Connection
from edge_client.connection.identity import Pins
from edge_client.connection.remote import Remote
from oneround.errors import Refused
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc
from tests import commands
from tests.attacks.refusals import EVALUATION, MALLORY, refused, status_of
from tests.clients import Crowd, connected, me, session, signed_in, speaking
from tests.daemons import ALICE, BOB, SPEC, join, judged, nothing, running, trained, written
from tests.waiting import LONG, eventually

WEEK = 7 * 86400.0
Entry = MutableMapping[str, Any]
# Calls that are a client's own, by the lease that it holds.
BY_LEASE = ("Heartbeat", "Withdraw", "Report", "OpenUpload", "Upload")


@asynccontextmanager
async def kept(
    state: Path, who: str = "open", clock: Callable[[], float] = time.time
) -> AsyncIterator[tuple[Daemon, Crowd, list[Entry]]]:
    """A daemon with the job `notes` for these, a crowd at its door, and what its log says."""
    with capture_logs() as said:
        async with running(state, clock) as (daemon, address), connected(address, state) as crowd:
            await daemon.operator.submit(job.parse({**SPEC, "access": {"who": who}}))
            yield daemon, crowd, said
    assert not [entry for entry in said if entry["event"] == "fault"], said


@asynccontextmanager
async def another(state: Path) -> AsyncIterator[Crowd]:
    """Another coordinator."""
    async with running(state) as (_, address), connected(address, state) as crowd:
        yield crowd


def logged(said: list[Entry], method: str, status: StatusCode) -> int:
    """How often the log says that this was refused."""
    found = [entry for entry in said if entry["event"] == "refused" and entry["method"] == method]
    times = Counter((entry["status"], bool(entry["reason"]), bool(entry["peer"])) for entry in found)
    return times[status.name, True, True]


def request(method: str, lease: str = "", **fields: Any) -> Any:
    """A sound request for `notes`; of a stream, all that is sent."""
    declaration = pb.Declaration(digest="0" * 64, size=10, num_examples=1)
    match method:
        case "Upload":
            return iter([pb.UploadRequest(lease=lease, data=b"x")])
        case "OpenUpload":
            return pb.OpenUploadRequest(lease=lease, declaration=declaration)
        case "Report":
            return pb.ReportRequest(lease=lease, evaluation=EVALUATION)
    service = "Federation" if method in rpc.FederationServicer.__dict__ else "Admin"
    kind = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method].input_type
    known = {"lease": lease, "job": "notes", **fields}
    made: Message = getattr(pb, kind.name)(**{name: known[name] for name in known if name in kind.fields_by_name})
    return made


def methods(service: str) -> list[str]:
    return [method.name for method in pb.DESCRIPTOR.services_by_name[service].methods]


async def token(daemon: Daemon, state: Path, **fields: Any) -> str:
    asked = pb.CreateTokenRequest(**{"job": "notes", "holds_seconds": WEEK, "uses": 1, **fields})
    return (await control.create_token(state, asked)).secret


# ---- sessions ----


async def test_without_a_session_there_is_nothing(tmp_path: Path) -> None:
    async with kept(tmp_path / "state") as (_, crowd, said), another(tmp_path / "other") as elsewhere:
        lease = (await join(crowd)).lease
        foreign = await session(await elsewhere.speaker(ALICE))
        gate = ("Challenge", "SignIn")
        for method in [name for name in methods("Federation") if name not in gate]:
            for given in ([], [("authorization", "")], [("authorization", "Session ")], foreign):
                call = getattr(crowd.plain, method)(request(method, lease), metadata=given)
                await refused(call, StatusCode.UNAUTHENTICATED, "needs a session")
            assert logged(said, method, StatusCode.UNAUTHENTICATED) == 4, method
        assert (await beaten(crowd, lease)).directive == pb.DIRECTIVE_CONTINUE


async def beaten(crowd: Crowd, lease: str) -> pb.HeartbeatReply:
    return await crowd.heartbeat(pb.HeartbeatRequest(lease=lease))


async def test_a_lease_is_its_clients_alone(tmp_path: Path) -> None:
    async with kept(tmp_path / "state") as (daemon, crowd, said):
        alice = await join(crowd)
        assert (await join(crowd, MALLORY)).lease != alice.lease
        mine = await session(await crowd.speaker(MALLORY))
        for method in BY_LEASE:
            call = getattr(crowd.plain, method)(request(method, alice.lease), metadata=mine)
            await refused(call, StatusCode.PERMISSION_DENIED, "another client's")
            assert logged(said, method, StatusCode.PERMISSION_DENIED) == 1, method
        (client,) = [each for each in (await daemon.operator.status("notes")).clients if each.name == ALICE[:5]]
        assert client.phase == pb.PHASE_TRAINING and not client.evaluations
        file, declaration = written(trained(alice), tmp_path / "alice")
        await crowd.upload(alice.lease, declaration, file, nothing)
        assert (await judged(crowd, alice.lease)).verdict == pb.VERDICT_ADMITTED


async def test_a_stolen_session_ends_with_a_ban(tmp_path: Path) -> None:
    """A session is all that it takes, so an operator can end it at once; nobody else is kept out."""

    state = tmp_path / "state"
    async with kept(state) as (_, crowd, said):
        lease, other = (await join(crowd)).lease, (await join(crowd, BOB)).lease
        stolen = await session(await crowd.speaker(ALICE))
        beat = pb.HeartbeatRequest(lease=lease)
        assert (await status_of(crowd.plain.Heartbeat(beat, metadata=stolen)))[0] == StatusCode.OK
        ban = pb.SettleRequest(client=public_id(me(ALICE).client_id), settlement=pb.SETTLEMENT_BAN, why="lost")
        assert (await control.settle(state, ban)).banned
        for method in [name for name in methods("Federation") if name not in ("Challenge", "SignIn")]:
            call = getattr(crowd.plain, method)(request(method, lease), metadata=stolen)
            await refused(call, StatusCode.PERMISSION_DENIED, "has banned this client")
            assert logged(said, method, StatusCode.PERMISSION_DENIED) == 1, method
        with pytest.raises(Refused, match="has banned this client"):  # nor is there another one
            await speaking(crowd, ALICE).jobs()
        assert logged(said, "SignIn", StatusCode.PERMISSION_DENIED) == 1
        assert (await beaten(crowd, other)).directive == pb.DIRECTIVE_CONTINUE
        await control.settle(state, pb.SettleRequest(client=ban.client, settlement=pb.SETTLEMENT_UNBAN))
        assert (await beaten(crowd, lease)).directive == pb.DIRECTIVE_CONTINUE
        assert [entry["decision"] for entry in said if entry["event"] == "settled"] == ["ban", "unban"]


async def test_a_ban_outlasts_a_restart(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with kept(state) as (_, crowd, _):
        await join(crowd)
        stolen = await session(await crowd.speaker(ALICE))
        await control.settle(state, pb.SettleRequest(client=ALICE[:5], settlement=pb.SETTLEMENT_BAN))
    async with kept(state) as (_, crowd, _):
        await refused(crowd.plain.ListJobs(pb.ListJobsRequest(), metadata=stolen), StatusCode.PERMISSION_DENIED)


async def test_sessions_end(tmp_path: Path) -> None:
    now = [1_800_000_000.0]

    async with kept(tmp_path / "state", clock=lambda: now[0]) as (_, crowd, said):
        old = await session(crowd)
        now[0] += 3601
        await refused(crowd.plain.ListJobs(pb.ListJobsRequest(), metadata=old), StatusCode.UNAUTHENTICATED, "over")
        assert logged(said, "ListJobs", StatusCode.UNAUTHENTICATED) == 1
        assert (await crowd.jobs()).jobs, "a client signs in anew"


# ---- signing in ----


async def test_a_sign_in_that_is_played_again(tmp_path: Path) -> None:
    async with kept(tmp_path / "state") as (_, crowd, said), another(tmp_path / "other") as elsewhere:
        heard = await signed_in(crowd, ALICE)
        assert (await crowd.plain.SignIn(heard)).session
        for _ in range(3):
            await refused(crowd.plain.SignIn(heard), StatusCode.UNAUTHENTICATED, "has been used")
        await refused(elsewhere.plain.SignIn(heard), StatusCode.UNAUTHENTICATED, "not one of this coordinator's")
        fresh = await signed_in(crowd, ALICE)
        await refused(elsewhere.plain.SignIn(fresh), StatusCode.UNAUTHENTICATED, "not one of this coordinator's")
        heard.challenge = fresh.challenge  # an old signature under a new challenge
        await refused(crowd.plain.SignIn(heard), StatusCode.UNAUTHENTICATED, "not this key's")
        fresh.token = "x" * 22  # a token that the client did not send
        await refused(crowd.plain.SignIn(fresh), StatusCode.UNAUTHENTICATED, "not this key's")
        fresh.token, fresh.key = "", me(MALLORY).public_key
        await refused(crowd.plain.SignIn(fresh), StatusCode.UNAUTHENTICATED, "not this key's")
        assert logged(said, "SignIn", StatusCode.UNAUTHENTICATED) == 8


class Between(rpc.FederationServicer):
    """Passes on to the true coordinator whatever it is told, and keeps what it gets."""

    def __init__(self, true: Any) -> None:
        self._true, self.heard, self.sessions = true, 0, []  # type: ignore[var-annotated]

    async def Challenge(self, request: Any, context: Any) -> Any:
        return await self._true.Challenge(request)

    async def SignIn(self, request: Any, context: Any) -> Any:
        self.heard += 1
        try:
            reply = await self._true.SignIn(request)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())
        self.sessions.append(reply.session)
        return reply


@asynccontextmanager
async def between(folder: Path, true: Crowd) -> AsyncIterator[tuple[str, Between]]:
    """Somebody on the way, with a TLS key of their own; at an address that a client may take for the coordinator's."""
    mallory, who = Between(true.plain), identity.load_or_create(folder)
    server = grpc.aio.server()
    rpc.add_FederationServicer_to_server(mallory, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(who.key, who.certificate)]))
    await server.start()
    try:
        yield f"127.0.0.1:{port}", mallory
    finally:
        await server.stop(None)


async def test_somebody_in_between_signs_in_as_nobody(tmp_path: Path) -> None:
    """A client that takes the wrong key at first use proves who it is to that key alone."""

    async with (
        kept(tmp_path / "state") as (_, crowd, said),
        between(tmp_path / "mallory", crowd) as (address, mallory),
        remotes.connect(address, Pins(tmp_path / "client"), lambda *_: None, me=me(ALICE)) as remote,
    ):
        with pytest.raises(Refused, match="not this key's, or not for this coordinator"):
            await remote.jobs()
        assert mallory.heard == 1 and not mallory.sessions
        assert logged(said, "SignIn", StatusCode.UNAUTHENTICATED) == 1
        assert (await (await crowd.speaker(ALICE)).jobs()).jobs, "the true one takes the same key"


# ---- tokens ----


async def nothing_to_see(crowd: Crowd, speaker: Remote, said: list[Entry]) -> None:
    """A job is as if it were not there."""
    assert not (await speaker.jobs()).jobs
    known = await session(speaker)
    for method in ("Describe", "Watch", "Download", "Join"):
        before = logged(said, method, StatusCode.NOT_FOUND)
        hidden, missing = [
            await status_of(getattr(crowd.plain, method)(request(method, job=name), metadata=known))
            for name in ("notes", "never")
        ]
        assert hidden[0] == missing[0] == StatusCode.NOT_FOUND, method
        assert hidden[1].replace("notes", "never") == missing[1], "nor do the words tell"
        assert logged(said, method, StatusCode.NOT_FOUND) == before + 2
    for method in ("Describe", "Join"):
        call = getattr(crowd.plain, method)(request(method, job=""), metadata=known)
        await refused(call, StatusCode.FAILED_PRECONDITION, "no job is open here")


async def test_a_job_for_token_holders_is_invisible_to_others(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with kept(state, "token") as (daemon, crowd, said):
        await nothing_to_see(crowd, crowd, said)
        secret = await token(daemon, state)
        holder = speaking(crowd, ALICE, secret)
        assert [found.spec.name for found in (await holder.jobs()).jobs] == ["notes"]
        assert holder.token_job == "notes"
        reply = await holder.join(pb.JoinRequest(job="notes", client_name="alice"))
        file, declaration = written(trained(reply), tmp_path / "alice")
        await holder.download("notes", reply.job.initial, tmp_path / "initial.safetensors", nothing)
        assert (await holder.upload(reply.lease, declaration, file, nothing)).digest == declaration.digest
        later = speaking(crowd, ALICE)  # without the token, as after a restart
        assert (await later.join(pb.JoinRequest(job="notes"))).lease == reply.lease
        await nothing_to_see(crowd, await crowd.speaker(MALLORY), said)
        for guess in ("x" * 22, secret[:-1], f" {secret}"):
            with pytest.raises(Refused, match="not known here"):
                await speaking(crowd, MALLORY, guess).jobs()
        assert logged(said, "SignIn", StatusCode.PERMISSION_DENIED) == 3
        assert secret not in repr(said), "a log is read by many"


async def test_a_token_for_one_lets_one_in(tmp_path: Path) -> None:
    """Among many that bring it at the same moment too."""

    state = tmp_path / "state"
    async with kept(state, "token") as (daemon, crowd, said):
        secret = await token(daemon, state)
        holders = [speaking(crowd, f"holder {number}", secret) for number in range(12)]
        answers = await asyncio.gather(*(holder.jobs() for holder in holders), return_exceptions=True)
        (first,) = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert [found.spec.name for found in first.jobs] == ["notes"]
        refusals = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(each, Refused) and "used by somebody else" in str(each) for each in refusals)
        assert logged(said, "SignIn", StatusCode.PERMISSION_DENIED) == 11
        winner = holders[answers.index(first)]
        assert (await speaking_again(crowd, winner, secret).jobs()).jobs, "it may bring it again"
        ((used,),) = [[each.used for each in (await control.tokens(state)).tokens]]
        assert used == 1
        late = speaking(crowd, MALLORY)
        await nothing_to_see(crowd, late, said)


def speaking_again(crowd: Crowd, who: Remote, secret: str) -> Remote:
    """The same client after a restart."""
    there = crowd.connection
    return Remote(Connection(there.server, there.channel, there.certificate), me=who.me, token=secret)


async def test_tokens_that_let_nobody_in_any_more(tmp_path: Path) -> None:
    now = [1_800_000_000.0]

    state = tmp_path / "state"
    async with kept(state, "token", clock=lambda: now[0]) as (daemon, crowd, said):
        short = await token(daemon, state, holds_seconds=60, uses=0)
        gone = await token(daemon, state, uses=0)
        there = {each.id: each for each in (await control.tokens(state)).tokens}
        (revoked,) = [id for id, each in there.items() if each.expires_unix > now[0] + 60]
        assert (await speaking(crowd, ALICE, short).jobs()).jobs and (await speaking(crowd, BOB, gone).jobs()).jobs
        now[0] += 61
        await control.revoke_token(state, revoked)
        for secret, says in ((short, "has expired"), (gone, "was revoked")):
            with pytest.raises(Refused, match=says):
                await speaking(crowd, MALLORY, secret).jobs()
        assert logged(said, "SignIn", StatusCode.PERMISSION_DENIED) == 2
        for label, secret in ((ALICE, short), (BOB, gone)):
            assert (await speaking(crowd, label, secret).jobs()).jobs, "who is in stays in"
        with pytest.raises(Refused, match="no token"):
            await control.revoke_token(state, "0" * 8)
        assert [entry["token"] for entry in said if entry["event"] == "token_revoked"] == [revoked]


async def test_a_token_for_another_job_opens_no_door_here(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with kept(state, "token") as (daemon, crowd, _):
        await daemon.operator.submit(job.parse({**SPEC, "name": "other", "access": {"who": "token"}}))
        holder = speaking(crowd, MALLORY, await token(daemon, state, job="other"))
        assert [found.spec.name for found in (await holder.jobs()).jobs] == ["other"]
        for call in (holder.describe("notes"), holder.join(pb.JoinRequest(job="notes")), holder.job("notes")):
            with pytest.raises(Refused, match="no job 'notes'"):
                await call
        every = speaking(crowd, ALICE, await token(daemon, state, job=""))
        assert len((await every.jobs()).jobs) == 2


async def test_a_deleted_job_takes_its_passes_along(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with kept(state, "token") as (daemon, crowd, said):
        secret = await token(daemon, state, uses=0)
        holder = speaking(crowd, ALICE, secret)
        reply = await holder.join(pb.JoinRequest(job="notes"))
        await daemon.operator.cancel("notes")
        await daemon.operator.delete("notes")
        await daemon.operator.submit(job.parse({**SPEC, "access": {"who": "token"}}))
        await nothing_to_see(crowd, holder, said)
        beat = crowd.plain.Heartbeat(request("Heartbeat", reply.lease), metadata=await session(holder))
        await refused(beat, StatusCode.PERMISSION_DENIED, "not known")
        with pytest.raises(Refused, match="not known"):
            await speaking(crowd, BOB, secret).jobs()


# ---- approval ----


async def test_who_asks_is_let_in_by_the_operator_alone(tmp_path: Path) -> None:
    state, alice = tmp_path / "state", public_id(me(ALICE).client_id)
    async with kept(state, "approved") as (daemon, crowd, said):
        speaker = await crowd.speaker(ALICE)
        known = await session(speaker)

        async def settled(settlement: pb.Settlement.ValueType) -> list[bool]:
            asked = pb.SettleRequest(client=alice, job="notes", settlement=settlement)
            return [each.granted for each in (await control.settle(state, asked)).passes]

        asked = pb.JoinRequest(job="notes", client_name="alice")
        for _ in range(3):  # it asks, and waits
            reply = await speaker.join(asked)
            assert reply.awaits_approval and not reply.lease and reply.job.spec.name == "notes"
        (found,) = (await control.clients(state, "notes")).clients
        assert (found.id, found.name, [each.granted for each in found.passes]) == (alice, "alice", [False])
        wanted = pb.DownloadRequest(job="notes", digest=reply.job.initial.digest)
        await refused(
            crowd.plain.Download(wanted, metadata=known), StatusCode.PERMISSION_DENIED, "has not let this client"
        )
        assert logged(said, "Download", StatusCode.PERMISSION_DENIED) == 1
        assert not (await daemon.operator.status("notes")).clients

        assert await settled(pb.SETTLEMENT_APPROVE) == [True]
        reply = await crowd.join_as(ALICE, asked)
        assert reply.lease and not reply.awaits_approval
        file, declaration = written(trained(reply), tmp_path / "alice")
        opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)
        await crowd.plain.OpenUpload(opened, metadata=known)
        assert (await status_of(crowd.plain.Download(wanted, metadata=known)))[0] == StatusCode.OK

        assert await settled(pb.SETTLEMENT_REFUSE) == []  # and the lease that it has is of no use
        data = file.read_bytes()
        for method, sent in (
            ("Download", wanted),
            ("OpenUpload", opened),
            ("Upload", iter([pb.UploadRequest(lease=reply.lease, data=data)])),
            ("Report", request("Report", reply.lease)),
        ):
            before = logged(said, method, StatusCode.PERMISSION_DENIED)
            call = getattr(crowd.plain, method)(sent, metadata=known)
            await refused(call, StatusCode.PERMISSION_DENIED, "has not let this client")
            assert logged(said, method, StatusCode.PERMISSION_DENIED) == before + 1
        assert (await speaker.join(asked)).awaits_approval
        assert await settled(pb.SETTLEMENT_APPROVE) == [True]
        assert (await crowd.upload(reply.lease, declaration, file, nothing)).digest == declaration.digest


async def test_keys_without_end_fill_no_table(tmp_path: Path) -> None:
    """Keys cost nothing. Who is turned away from a full or closed job is not written down."""

    state = tmp_path / "state"
    async with kept(state) as (daemon, crowd, said):
        few = {**SPEC, "name": "few", "round": {"min_clients": 1, "target_clients": 0, "max_clients": 3}}
        await daemon.operator.submit(job.parse(few))
        strangers = [speaking(crowd, f"stranger {number}") for number in range(20)]
        joins = [stranger.join(pb.JoinRequest(job="few")) for stranger in strangers]
        answers = await asyncio.gather(*joins, return_exceptions=True)
        assert sum(isinstance(answer, pb.JoinReply) for answer in answers) == 3
        assert logged(said, "Join", StatusCode.RESOURCE_EXHAUSTED) == 17
        await daemon.operator.cancel("notes")
        for stranger in strangers:
            with pytest.raises(Refused, match="no more contributions"):
                await stranger.join(pb.JoinRequest(job="notes"))
        assert len((await control.clients(state, "")).clients) == 3


# ---- the operator, and who would be ----


async def test_the_operators_calls_need_the_operators_token(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with kept(state) as (daemon, crowd, said), control.channel(state) as (channel, right):
        ((_, mine),) = await session(crowd)
        secret = await token(daemon, state)
        stub = rpc.AdminStub(channel)
        wrong = ([], [("authorization", mine)], [("authorization", mine.replace("Session", "Bearer"))])
        for method in methods("Admin"):
            for given in (*wrong, [("authorization", f"Bearer {secret}")]):
                await refused(getattr(stub, method)(request(method), metadata=given), StatusCode.UNAUTHENTICATED)
            denied = [entry for entry in said if entry["event"] == "admin_refused" and entry["method"] == method]
            assert len(denied) == 4 and all("peer" in entry for entry in denied), method
        assert (await daemon.operator.status("notes")).state == pb.STATE_OPEN
        assert right[0][1].removeprefix("Bearer ") not in repr(said) and mine.partition(" ")[2] not in repr(said)


async def test_the_operator_is_no_client(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with kept(state, "token") as (daemon, crowd, said), control.channel(state) as (_, right):
        lease = (await speaking(crowd, ALICE, await token(daemon, state)).join(pb.JoinRequest(job="notes"))).lease
        await refused(crowd.plain.Join(request("Join"), metadata=right), StatusCode.INVALID_ARGUMENT, "is no client's")
        assert logged(said, "Join", StatusCode.INVALID_ARGUMENT) == 1
        for method in BY_LEASE:
            call = getattr(crowd.plain, method)(request(method, lease), metadata=right)
            await refused(call, StatusCode.PERMISSION_DENIED, "another client's")
            assert logged(said, method, StatusCode.PERMISSION_DENIED) == 1, method
        seen = await crowd.plain.ListJobs(pb.ListJobsRequest(), metadata=right)
        assert [found.spec.name for found in seen.jobs] == ["notes"]
        assert len((await daemon.operator.status("notes")).clients) == 1


# ---- from another network ----

_FAR = """
import asyncio, json, sys
from pathlib import Path
from oneround.errors import OneroundError
from edge_client.connection import remote
from edge_client.connection.channel import Connection
from edge_client.connection.identity import Pins
from oneround.v1 import federation_pb2 as pb

async def main(state, *addresses):
    for address in addresses:
        async with remote.connect(address, Pins(Path(state)), lambda *_: None) as there:
            jobs = [job.spec.name for job in (await there.jobs()).jobs]
            try:
                lease = (await there.join(pb.JoinRequest(job="notes", client_name="far"))).lease
            except OneroundError as error:
                lease = str(error)
            print(json.dumps([jobs, lease]), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes network namespaces")
def test_who_joined_an_open_job_keeps_its_place_from_another_network(
    namespaces: tuple[str, str],
    tmp_path: Path,
) -> None:
    """Two addresses on one cable: 10.77.0.1 as on a local network, 11.77.0.1 as on the internet."""
    for number, name in enumerate(namespaces, 1):
        subprocess.run(["ip", "-n", name, "addr", "add", f"11.77.0.{number}/24", "dev", "lan0"], check=True)
    state, spec = tmp_path / "state", tmp_path / "notes.toml"
    spec.write_text(f'name = "notes"\n[model]\nbase = "{SPEC["model"]["base"]}"\n[lora]\nrank = 2\n')  # type: ignore[index]
    serves = ("serve", "--listen", "0.0.0.0:50051", "--state", state, "--no-advertise", "--job", spec)
    with (tmp_path / "log").open("w") as log:
        daemon = subprocess.Popen(
            ["ip", "netns", "exec", namespaces[0], str(commands.BIN / "coordinator"), *map(str, serves)],
            stdout=log,
            stderr=log,
        )
    try:
        assert eventually(lambda: (state / "daemon.json").exists() or daemon.poll() is not None)

        def joins(who: str, *hosts: str) -> list[Any]:
            program = [sys.executable, "-c", _FAR, str(tmp_path / who), *(f"{host}:50051" for host in hosts)]
            done = subprocess.run(
                ["ip", "netns", "exec", namespaces[1], *program], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
            return [json.loads(line) for line in done.stdout.splitlines()]

        assert joins("far", "11.77.0.1") == [[[], "there is no job 'notes' for this client"]]
        (near, away, again) = joins("near", "10.77.0.1", "11.77.0.1", "10.77.0.1")
        assert near[0] == ["notes"] and len(near[1]) == 64
        assert near == away == again
    finally:
        daemon.terminate()
        assert daemon.wait(timeout=LONG) == 0
