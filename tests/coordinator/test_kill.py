"""kill -9 at every durable step: what was acknowledged is there once, what was not can go on, and nothing is left over.

The steps and the process that dies at them are in dying.py. A sweep lets a daemon die at its first step, starts it
again, goes on as clients and the operator would, and looks at what is there; then at its second step, and so on, until
a run ends by itself. In `make test` one death per kind of step has to do, before publishing; the rest is slow.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from grpc import StatusCode

from coordinator.cli import client as control
from coordinator.jobs import spec as job
from oneround import statements, stream
from oneround.errors import Refused, Unreachable
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd, connected, me
from tests.coordinator.dying import HOOK, ROOT, Plan
from tests.daemons import ALICE, BOB, SPEC, judged, trained, written
from tests.waiting import LONG

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names open files by /proc, and forks")

CAROL = "c" * 32
CHUNK = 8 * 1024  # an adapter of SPEC is some 30 KB
WORKERS = 3  # rounds at a time, on two cores: each waits for its daemon most of the time
_GONE = {StatusCode.UNAVAILABLE, StatusCode.CANCELLED}
_FAULT = "a fault in the coordinator"

# What dies, as dying.py names it. A step that is not here was added to the daemon since, and one that is here and does
# not happen is gone; either way somebody should look at what a death there leaves.
STARTING_AGAIN = {
    *("open lock", "commit upgrade"),
    *("open .daemon.json.partial", "fsync .daemon.json.partial", "rename daemon.json", "fsync ."),
}
STARTING = STARTING_AGAIN | {
    *(
        f"{verb} {name}.partial"
        for verb in ("open", "fsync")
        for name in ("key", "certificate", "admin-token", "session-secret")
    ),
    *(f"rename {name}" for name in ("key.pem", "certificate.pem", "admin-token", "session-secret")),
    *("mkdir blobs", "mkdir uploads"),
}
SUBMITTING = {
    *("mkdir bases", "open bases/.<digest>.gguf.partial", "fsync bases/.<digest>.gguf.partial"),
    *("rename bases/<digest>.gguf", "fsync bases", "open uploads/.notes.initial.partial"),
    *("fsync uploads/.notes.initial.partial", "rename uploads/notes.initial", "fsync uploads"),
    *("link blobs/<digest>", "fsync blobs", "unlink uploads/notes.initial", "commit add_job"),
}
_PARTIAL = "uploads/notes.<client>.<digest>"
SENDING = {
    *(
        "commit grant_pass",
        "commit record_seen",
        "commit join",
        f"open {_PARTIAL}",
        f"write {_PARTIAL}",
        f"fsync {_PARTIAL}",
        "link blobs/<digest>",
    ),
    *("fsync blobs", "commit contribute", f"unlink {_PARTIAL}"),
}
TAKING = SENDING | {"commit decide", "commit withdraw"}


def _placed(folder: str, name: str) -> set[str]:
    return {f"open {folder}/.{name}.partial", f"fsync {folder}/.{name}.partial", f"rename {folder}/{name}"}


_VERSIONS, _WORK = "publications/notes", "publications/notes/v<n>.partial"
PUBLISHING = SENDING.union(
    {"commit record_soundness", "commit advance", "mkdir publications", f"mkdir {_VERSIONS}", f"fsync {_VERSIONS}"},
    _placed(_VERSIONS, "v<n>.order.json"),
    {f"mkdir {_WORK}", f"fsync {_WORK}", f"rename {_VERSIONS}/v<n>", f"unlink {_VERSIONS}/v<n>.order.json"},
    *(_placed(_WORK, name) for name in ("adapter.gguf", "notes-f16.gguf", "README.md", "Modelfile", "manifest.json")),
    *({f"mkdir {_WORK}/{kind}", f"fsync {_WORK}/{kind}"} for kind in ("peft", "mlx")),
    *(_placed(f"{_WORK}/{kind}", "adapter_config.json") for kind in ("peft", "mlx")),
    _placed(f"{_WORK}/peft", "adapter_model.safetensors"),
    _placed(f"{_WORK}/mlx", "adapters.safetensors"),
    _placed(f"{_VERSIONS}/v<n>", "manifest.json.signature"),
    {f"fsync {_VERSIONS}/v<n>", "commit publish"},
)
_FILES = ("adapter.gguf", "notes-f16.gguf", "README.md", "Modelfile", "manifest.json", "manifest.json.signature")
DELETING = {"commit mark_deleted", "commit forget", "unlink blobs/<digest>", f"rmdir {_VERSIONS}"}.union(
    *({f"unlink {_VERSIONS}/v<n>/{name}" for name in _FILES},),
    {f"rmdir {_VERSIONS}/v<n>", f"rmdir {_VERSIONS}/v<n>/peft", f"rmdir {_VERSIONS}/v<n>/mlx"},
    {f"unlink {_VERSIONS}/v<n>/{kind}/adapter_config.json" for kind in ("peft", "mlx")},
    {f"unlink {_VERSIONS}/v<n>/peft/adapter_model.safetensors", f"unlink {_VERSIONS}/v<n>/mlx/adapters.safetensors"},
)
# By the clock, or by what the examiner is up to.
SOMETIMES = {"commit record_progress", "commit record_soundness", "commit advance"}


# ---- a process of daemons ----


class Daemons:
    """Starts daemons that die, and knows when they have."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._started: asyncio.Queue[int] = asyncio.Queue()
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._one = asyncio.Lock()
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "code" in said:
                self._ended[said["pid"]].set_result(said["code"])
            else:
                self._ended[said["pid"]] = asyncio.get_running_loop().create_future()
                self._started.put_nowait(said["pid"])

    async def start(self, plan: Plan) -> Running:
        assert self._process.stdin is not None
        (Path(plan.state) / "daemon.json").unlink(missing_ok=True)
        async with self._one:
            self._process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
            pid = await self._started.get()
        return Running(pid, self._ended[pid])

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._listening


@dataclass(frozen=True)
class Running:
    """A daemon that was started, and how it ends: with an exit code, or with −9."""

    pid: int
    ended: asyncio.Future[int]

    async def kill(self, how: signal.Signals) -> int:
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)
        return await asyncio.wait_for(asyncio.shield(self.ended), LONG)


@asynccontextmanager
async def daemons(folder: Path) -> AsyncIterator[Daemons]:
    hook = folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    path = os.pathsep.join([str(hook), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.coordinator.dying"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
    )
    made = Daemons(process)
    try:
        yield made
    finally:
        await made.close()


# ---- clients and an operator that come back ----


@dataclass
class World:
    """A state folder, and what clients and operator remember. Everything in it may be done again."""

    folder: Path
    spec: pb.JobSpec
    receipts: dict[str, list[pb.Receipt]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def steps(self) -> Path:
        return self.folder / "steps"

    def names(self) -> list[str]:
        return self.steps.read_text().splitlines() if self.steps.exists() else []

    async def submit(self) -> None:
        await control.submit(self.state, self.spec)

    async def contribute(self, remote: Crowd, client: str, seed: int) -> None:
        """As edge-client does it: join, send from where the coordinator is, keep the receipt."""
        reply = await remote.join_as(client, pb.JoinRequest(job="notes", client_name=client[:5]))
        mine = self.receipts.setdefault(client, [])
        file, declaration = written(trained(reply, seed), self.folder / f"{client[:5]}{seed}")
        for earlier in mine:
            assert reply.HasField("receipt"), "a receipt was given, and joining again knows nothing of it"
            assert reply.receipt == mine[-1] or reply.receipt.digest == declaration.digest, earlier
        opened = await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
        receipt = opened.receipt
        if not opened.HasField("receipt"):
            receipt = await remote._stub.Upload(self._pieces(reply.lease, file.read_bytes(), opened.committed_offset))
        assert (receipt.digest, receipt.size) == (declaration.digest, declaration.size)
        again = [known for known in mine if known.digest == receipt.digest]
        assert again in ([], [receipt]), "the same contribution has the same receipt for ever"
        if not again:
            mine.append(receipt)

    async def _pieces(self, lease: str, data: bytes, offset: int) -> AsyncIterator[pb.UploadRequest]:
        yield pb.UploadRequest(lease=lease, offset=offset)
        for start in range(offset, len(data), CHUNK):
            yield pb.UploadRequest(data=data[start : start + CHUNK])
            await asyncio.sleep(0.002)  # several writes, rather than one of all that waits

    async def once(self, what: str, action: Callable[[], Awaitable[object]]) -> None:
        """What a person does once, and again only if nothing came back."""
        if what not in self.done:
            await action()
            self.done.add(what)


Script = Callable[[World, Crowd], Awaitable[None]]


async def submitting(world: World, _: Crowd) -> None:
    await world.submit()


async def taking(world: World, remote: Crowd) -> None:
    """Two contributions, a replacement, a client that leaves with half an upload, and one that leaves after all."""
    if "replacing" not in world.done:
        await world.contribute(remote, ALICE, 0)
    if "leaving" not in world.done:
        await world.contribute(remote, BOB, 1)
    await world.once("carol", lambda: _leave_halfway(world, remote))
    if "replaced" not in world.done:
        world.done.add("replacing")
        await control.judge(world.state, _replace(ALICE))
        await world.contribute(remote, ALICE, 2)
        world.done.add("replaced")
    world.done.add("leaving")
    await world.once("left", lambda: _leave(remote, BOB))


async def publishing(world: World, remote: Crowd) -> None:
    """The second contribution closes the round, and the publication comes."""
    await world.contribute(remote, BOB, 1)
    async with asyncio.timeout(LONG):
        async for status in remote.watch("notes"):
            assert status.state != pb.STATE_FAILED, status.reason
            if status.state == pb.STATE_PUBLISHED:
                world.done.add("published")
                break


async def deleting(world: World, _: Crowd) -> None:
    with suppress(Refused):  # the last try got through, and only its answer did not: there is no such job
        await control.delete(world.state, "notes")
    assert not await control.jobs(world.state)
    world.done.add("deleted")


def _replace(client: str) -> pb.JudgeRequest:
    return pb.JudgeRequest(job="notes", client=public_id(me(client).client_id), decision=pb.DECISION_LET_REPLACE)


async def _leave(remote: Crowd, client: str) -> None:
    reply = await remote.join_as(client, pb.JoinRequest(job="notes"))
    await remote.withdraw(reply.lease)


async def _leave_halfway(world: World, remote: Crowd) -> None:
    reply = await remote.join_as(CAROL, pb.JoinRequest(job="notes", client_name="carol"))
    file, declaration = written(trained(reply, 3), world.folder / "carol")
    opened = await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
    if opened.committed_offset < CHUNK:
        half = file.read_bytes()[: 2 * CHUNK]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await remote._stub.Upload(world._pieces(reply.lease, half, opened.committed_offset))
        if caught.value.code() != StatusCode.ABORTED:
            raise caught.value
    await remote.withdraw(reply.lease)


# ---- what has to hold ----


@dataclass(frozen=True)
class Rows:
    """What the database holds."""

    contributions: list[tuple[str, str, str, int, int, str]]  # job, client, digest, size, replaced, by_hand
    initial: list[str]  # digests
    versions: list[tuple[int, bool]]  # and whether each is made
    events: Counter[tuple[str, str, str]]  # job, kind and client


def at_rest(state: Path) -> Rows:
    """A state folder over which nobody is at work any more: nothing in it is half done or left over."""
    database = sqlite3.connect(f"file:{state / 'coordinator.sqlite'}?mode=ro", uri=True)
    try:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        rows = Rows(
            database.execute("select job, client_id, digest, size, replaced, by_hand from contributions").fetchall(),
            [json.loads(text)["initial"]["digest"] for (text,) in database.execute("select job from jobs")],
            database.execute("select version, publication is not null from publications").fetchall(),
            Counter(database.execute("select job, kind, client_id from events").fetchall()),
        )
        numbers = "select count(*), max(number), min(number) from events group by job"
        assert all(count == last and first == 1 for count, last, first in database.execute(numbers))
        _told(database, rows)
        jobs = "select name from jobs union select ''"
        assert not database.execute(f"select client_id, job from passes where job not in ({jobs})").fetchall()
    finally:
        database.close()
    blobs = {file.name for file in (state / "blobs").iterdir()}
    assert blobs == {*rows.initial, *(row[2] for row in rows.contributions)}
    assert all(stream.digest(state / "blobs" / name) == name for name in blobs)
    assert not list((state / "uploads").iterdir())
    left = [
        str(file.relative_to(state)) for file in state.rglob("*") if file.name.endswith((".partial", ".order.json"))
    ]
    assert not left
    assert {folder.name for folder in (state / "publications").glob("*/*")} == {
        f"v{n}" for n, made in rows.versions if made
    }
    return rows


def _told(database: sqlite3.Connection, rows: Rows) -> None:
    """What is in the database is told by events, and nothing else is."""
    assert {job for job, kind, _ in rows.events if kind == "round_opened"} == {
        name for (name,) in database.execute("select name from jobs")
    }
    joined = {(job, client): times for (job, kind, client), times in rows.events.items() if kind == "joined"}
    assert joined == dict.fromkeys(database.execute("select job, client_id from clients").fetchall(), 1)
    received = Counter((row[0], row[1]) for row in rows.contributions)
    assert received == {
        (job, client): times for (job, kind, client), times in rows.events.items() if kind == "contribution_received"
    }
    published = sum(times for (_, kind, _), times in rows.events.items() if kind == "version_published")
    assert published == sum(made for _, made in rows.versions)


def check(world: World) -> None:
    """What has to hold of a round's state folder at rest."""
    rows = at_rest(world.state)
    acknowledged = [(me(client).client_id, r.digest, r.size) for client, mine in world.receipts.items() for r in mine]
    if "deleted" in world.done:
        assert not (rows.contributions or rows.initial or rows.versions)
        return
    assert sorted(row[1:4] for row in rows.contributions) == sorted(acknowledged), "each that is acknowledged, once"
    for client, mine in world.receipts.items():
        standing = [row for row in rows.contributions if row[1] == me(client).client_id and not row[4]]
        assert [row[2] for row in standing] == [mine[-1].digest], "the last that is acknowledged stands"
        left = client == BOB and "left" in world.done
        assert standing[0][5] == ("exclude" if left else ""), "who withdraws takes no part"
    assert rows.versions == ([(1, True)] if "published" in world.done else [])
    for folder in (world.state / "publications").glob("*/*"):
        _check_publication(world, folder)


def _check_publication(world: World, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {given["id"]: given["digest"] for given in manifest["contributions"]}
    assert listed == {public_id(me(client).client_id): mine[-1].digest for client, mine in world.receipts.items()}
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert there == {"manifest.json", "manifest.json.signature", *manifest["files"]}
    signature = json_format.Parse((folder / "manifest.json.signature").read_text(), pb.Signature())
    assert statements.signer(signature, statements.manifest(stream.digest(folder / "manifest.json")))
    for name, file in manifest["files"].items():
        assert (stream.digest(folder / name), (folder / name).stat().st_size) == (file["sha256"], file["size"])


# ---- sweeps ----


async def play(world: World, known: Daemons, scripts: Collection[Script], plan: Plan) -> bool:
    """Drive a round through a death; returns whether there was one. The state folder is at rest afterwards."""
    log = world.folder / "state.log"
    daemon = await known.start(plan)
    if await _try(world, daemon, scripts):
        code = await daemon.kill(signal.SIGTERM)  # it may still die as it goes
    else:
        code = await daemon.ended
    if code:
        assert code == -signal.SIGKILL and plan.name, log.read_text()
        daemon = await known.start(Plan(plan.state, plan.steps))
        assert await _try(world, daemon, scripts), log.read_text()
        assert await daemon.kill(signal.SIGTERM) == 0, log.read_text()
    assert "Traceback" not in log.read_text() and "event=fault" not in log.read_text(), log.read_text()
    check(world)
    return code != 0


async def _try(world: World, daemon: Running, scripts: Collection[Script]) -> bool:
    """Whether all of it went through before the daemon died."""
    await _listening(world.state, daemon)
    with suppress(FileNotFoundError):
        address = json.loads((world.state / "daemon.json").read_text())["address"]
        try:
            async with connected(address, world.folder) as remote:
                for script in scripts:
                    await script(world, remote)
            return True
        except grpc.aio.AioRpcError as error:
            # INTERNAL is what gRPC's own core says when a connection goes while a message is on its way.
            if error.code() not in (_GONE | {StatusCode.INTERNAL}) or _FAULT in str(error.details()):
                raise
        except Unreachable:
            pass
    async with asyncio.timeout(LONG):  # who breaks a connection is about to be gone
        await asyncio.shield(daemon.ended)
    return False


async def _listening(state: Path, daemon: Running) -> None:
    """Until a daemon can be reached, or has ended."""
    for _ in range(int(LONG / 0.01)):
        if (state / "daemon.json").exists() or daemon.ended.done():
            return
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Sweep:
    """Scripts, and the world that they begin in."""

    folder: Path
    scripts: tuple[Script, ...]
    begin: World
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def world(self, name: str) -> World:
        fresh = World(
            self.folder / name,
            self.begin.spec,
            {client: list(mine) for client, mine in self.begin.receipts.items()},
            set(self.begin.done),
        )
        fresh.folder.mkdir()
        if self.begin.state.exists():
            shutil.copytree(self.begin.state, fresh.state)
        return fresh

    async def run(self, known: Daemons, name: str = "", at: int = 1, *, after: bool = False) -> tuple[bool, list[str]]:
        """One run that dies at a step; whether it came to that, and the names of its steps."""
        world = self.world(f"{next(self.numbers)}")
        world.state.mkdir(exist_ok=True)
        try:
            died = await play(world, known, self.scripts, Plan(str(world.state), str(world.steps), name, at, after))
        except BaseException as error:
            error.add_note(f"died {'after' if after else 'before'} number {at} of `{name}`; see {world.folder}")
            raise
        names = world.names()
        shutil.rmtree(world.folder)
        return died, names


async def every_step(sweep: Sweep, known: Daemons, *, late: bool = False, most: int = 10_000) -> set[str]:
    """Die at each step that a run has, before it or when it is done, until a run brings no new one; gives their names.

    Steps are counted by name, since those of several threads come in another order every time. No more than `most` of
    the same name.
    """
    _, names = await sweep.run(known)
    tried: set[tuple[str, int]] = set()
    untried = list(dict.fromkeys(_numbered(names, most)))
    fatal: set[str] = set()

    async def worker() -> None:
        while untried:
            name, at = untried.pop(0)
            tried.add((name, at))
            died, names = await sweep.run(known, name, at, after=late)
            if died:
                fatal.add(name)
            else:  # it came less often this time; the run was whole, and may have had others
                assert at > 1 or name in SOMETIMES, name
                untried.extend(dict.fromkeys(step for step in _numbered(names, most) if step not in {*tried, *untried}))

    await _together(worker)
    print(f"{len(tried)} deaths")
    return fatal


def _numbered(names: list[str], most: int) -> Iterator[tuple[str, int]]:
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        if seen[name] <= most:
            yield name, seen[name]


async def _together(worker: Callable[[], Coroutine[None, None, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(worker())


def _expect(names: set[str], expected: set[str]) -> None:
    print(*sorted(names), sep="\n")
    assert expected - SOMETIMES <= names <= expected | SOMETIMES, (expected - names, names - expected - SOMETIMES)


async def _prepared(folder: Path, known: Daemons, spec: Mapping[str, object], *scripts: Script) -> World:
    """A world at rest in which some of the script has been played."""
    world = World(folder / "begin", job.parse(spec))
    world.state.mkdir(parents=True)
    assert not await play(world, known, scripts, Plan(str(world.state), str(world.steps)))
    return world


async def one_is_in(world: World, remote: Crowd) -> None:
    await world.contribute(remote, ALICE, 0)
    await judged(remote, (await remote.join_as(ALICE, pb.JoinRequest(job="notes"))).lease)


Deaths = Callable[[Sweep, Daemons], Awaitable[set[str]]]
each_kind: Deaths = partial(every_step, most=1)


async def _sweep(folder: Path, how: Deaths, begin: tuple[Script, ...], *scripts: Script, **spec: object) -> set[str]:
    async with daemons(folder) as known:
        wanted = {**SPEC, **spec}
        world = await _prepared(folder, known, wanted, *begin) if begin else World(folder / "no", job.parse(wanted))
        return await how(Sweep(folder, scripts, world), known)


async def test_a_submission_survives_a_death_at_each_kind_of_step(tmp_path: Path) -> None:
    _expect(await _sweep(tmp_path, each_kind, (), submitting), STARTING | SUBMITTING)


async def test_contributions_survive_a_death_at_each_kind_of_step(tmp_path: Path) -> None:
    _expect(await _sweep(tmp_path, each_kind, (submitting,), taking), STARTING_AGAIN | TAKING)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_a_submission_survives_a_death_at_every_step(tmp_path: Path, late: bool) -> None:
    _expect(await _sweep(tmp_path, partial(every_step, late=late), (), submitting), STARTING | SUBMITTING)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_contributions_survive_a_death_at_every_step(tmp_path: Path, late: bool) -> None:
    _expect(await _sweep(tmp_path, partial(every_step, late=late), (submitting,), taking), STARTING_AGAIN | TAKING)


QUORUM = {"min_clients": 2, "target_clients": 2}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_a_publication_survives_a_death_at_every_step(tmp_path: Path, late: bool) -> None:
    """Its steps are those of the publisher too, whose death takes the daemon along."""
    deaths = partial(every_step, late=late, most=1 if late else 10_000)  # minutes; after one step is before the next
    found = await _sweep(tmp_path, deaths, (submitting, one_is_in), publishing, round=QUORUM)
    _expect(found, STARTING_AGAIN | PUBLISHING)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_a_deletion_survives_a_death_at_every_step(tmp_path: Path, late: bool) -> None:
    begin = (submitting, one_is_in, publishing)
    found = await _sweep(tmp_path, partial(every_step, late=late), begin, deleting, round=QUORUM)
    _expect(found, STARTING_AGAIN | DELETING)


# ---- at random ----

KILLS = int(os.environ.get("ONEROUND_TEST_KILLS", "300"))
SEED = int(os.environ.get("ONEROUND_TEST_SEED", "1"))
AT_ONCE = 8
JOBS = ("notes", "letters", "minutes")


@dataclass
class Load:
    """Clients that join, say how it goes, and send, one after another, whatever happens to the daemon."""

    folder: Path
    random: random.Random
    sendable: list[tuple[Path, pb.Declaration]]
    receipts: dict[tuple[str, str], pb.Receipt] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    broken: Counter[str] = field(default_factory=Counter)
    over: bool = False

    async def clients(self) -> None:
        while not self.over:
            client, name = f"{self.random.getrandbits(128):032x}", self.random.choice(JOBS)
            file, declaration = self.random.choice(self.sendable)
            leaves = self.random.random() < 0.1
            while not await self._try(client, name, file, declaration, leaves):  # noqa: ASYNC110  it waits for nothing
                await asyncio.sleep(self.random.uniform(0.01, 0.1))

    async def _try(self, client: str, name: str, file: Path, declaration: pb.Declaration, leaves: bool) -> bool:
        """Whether this client is done, with a receipt or by leaving."""
        try:
            address = json.loads((self.folder / "state" / "daemon.json").read_text())["address"]
            async with connected(address, self.folder) as remote:
                reply = await remote.join_as(client, pb.JoinRequest(job=name, client_name=client[:5]))
                for step in range(self.random.randrange(3)):
                    await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease, step=step, total_steps=3, loss=1.0))
                if leaves:
                    await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
                    await remote.withdraw(reply.lease)
                    self.left.add(client)
                    return True
                receipt = await self._send(remote, reply.lease, file, declaration)
                said = (receipt.job, receipt.client_id, receipt.digest)
                assert said == (name, me(client).client_id, declaration.digest)
                self.receipts[name, client] = receipt
                again = (await remote.join_as(client, pb.JoinRequest(job=name))).receipt
                assert again == receipt, "it is there from now on"
                return True
        except (FileNotFoundError, Unreachable) as error:
            self.broken[type(error).__name__] += 1
        except grpc.aio.AioRpcError as error:
            assert error.code() in _GONE | {StatusCode.INTERNAL, StatusCode.ABORTED}, error
            assert _FAULT not in str(error.details())
            self.broken[error.code().name] += 1
        return (name, client) in self.receipts

    async def _send(self, remote: Crowd, lease: str, file: Path, declaration: pb.Declaration) -> pb.Receipt:
        data = await asyncio.to_thread(file.read_bytes)
        opened = await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=lease, declaration=declaration))
        if opened.HasField("receipt"):
            return opened.receipt

        async def pieces() -> AsyncIterator[pb.UploadRequest]:
            sent = opened.committed_offset
            yield pb.UploadRequest(lease=lease, offset=sent)
            while sent < len(data):
                some = self.random.randrange(2048, 16384)
                yield pb.UploadRequest(data=data[sent : sent + some])
                sent += some
                await asyncio.sleep(self.random.uniform(0, 0.02))

        return await remote._stub.Upload(pieces())


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_kills_at_random_under_load(tmp_path: Path) -> None:
    async def _sendable(folder: Path) -> list[tuple[Path, pb.Declaration]]:
        address = json.loads((folder / "state" / "daemon.json").read_text())["address"]
        async with connected(address, folder) as remote:
            reply = await remote.join_as(ALICE, pb.JoinRequest(job="notes"))
            return [written(trained(reply, seed), folder / f"adapter-{seed}") for seed in range(40)]

    chance = random.Random(SEED)
    state = tmp_path / "state"
    state.mkdir()
    async with daemons(tmp_path) as known:
        plan = Plan(str(state), str(tmp_path / "steps"))
        daemon = await known.start(plan)
        await _listening(state, daemon)
        for name in JOBS:
            spec = job.parse({**SPEC, "name": name, "round": {**QUORUM, "target_clients": 0, "max_clients": 10**6}})
            await control.submit(state, spec)
        load = Load(tmp_path, chance, await _sendable(tmp_path))
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(load.clients())
            for _ in range(KILLS):
                if chance.random() < 0.9:  # the others die while they start
                    await _listening(state, daemon)
                await asyncio.sleep(chance.uniform(0.02, 0.8))
                assert await daemon.kill(signal.SIGKILL) == -9, "it died by itself"
                daemon = await known.start(plan)
            load.over = True  # and everybody ends what they are at
        assert await daemon.kill(signal.SIGTERM) == 0

    log = (tmp_path / "state.log").read_text()
    print(f"{KILLS} kills, {len(load.receipts)} receipts, {len(load.left)} left, {dict(load.broken)}")
    assert "event=fault" not in log and "Traceback" not in log, log[log.find("Traceback") - 500 :][:5000]
    rows = at_rest(state)
    found = {(name, client): (digest, size) for name, client, digest, size, _, _ in rows.contributions}
    assert len(found) == len(rows.contributions), "each once"
    assert found == {
        (name, me(client).client_id): (receipt.digest, receipt.size)
        for (name, client), receipt in load.receipts.items()
    }
    assert len(load.receipts) > KILLS // 4, "the load was one"
