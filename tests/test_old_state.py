"""What 0.1.0 left behind goes on: the folders of a coordinator and of a client, what the wire and the receipts said,
what `--json` prints, and exit codes.

The folders are in fixtures/version_0_1, whose README says what is in them. A test works on a copy, in which two kinds
of paths are written anew, as if the machine's folders had always been there. All else is as it was left, and nothing of
it depends on the day. Most tests look at what one daemon makes of one copy; none needs another to have run before.
"""

import asyncio
import json
import re
import shutil
import sqlite3
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oneround import invitation
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.clients import connected, speaking
from tests.daemons import running

FIXTURE = Path(__file__).parent / "fixtures" / "version_0_1"
PLACE = "/srv/oneround"  # where the folders stood
FACTS: dict[str, Any] = json.loads((FIXTURE / "facts.json").read_text())
STATES = {
    "published": "STATE_PUBLISHED",
    "publishing": "STATE_PUBLISHED",  # once it is taken up again
    "open": "STATE_OPEN",
    "half-sent": "STATE_OPEN",
    "half-trained": "STATE_OPEN",
    "approved": "STATE_OPEN",
    "expired": "STATE_EXPIRED",
    "failed": "STATE_FAILED",
    "cancelled": "STATE_CANCELLED",
}
SHOWN: dict[str, tuple[object, ...]] = {  # what the operator's commands printed of it, and which these were
    "jobs.json": ("jobs",),
    "published.json": ("show", "published"),
    "open.json": ("show", "open"),
    "tokens.json": ("token", "list"),
    "clients.json": ("clients",),
    "diff.json": ("diff", "published", 1, 2),
}
TRAINING = ("--backend", "torch", "--precision", "float32", "--min-memory", 0, "--min-battery", 0)
# Events that a slow or a small machine has, or a fast one lacks.
SOMETIMES = {"memory", "parts", "retry", "waiting", "pending"}
PATIENCE = 300.0  # seconds

Events = list[dict[str, Any]]


def unpack(to: Path) -> Path:
    """A copy to work on."""
    shutil.copytree(FIXTURE, to)
    for copy, of in FACTS["copies"].items():
        (to / copy).parent.mkdir(parents=True, exist_ok=True)
        if (to / of).is_dir():
            shutil.copytree(to / of, to / copy)
        else:
            shutil.copy(to / of, to / copy)
    database = sqlite3.connect(to / "coordinator" / "coordinator.sqlite")
    with database:
        database.execute("update jobs set base_folder = replace(base_folder, ?, ?)", (PLACE, str(to)))
    database.close()
    for file in (to / "client" / "jobs").glob("*/source.json"):
        file.write_text(file.read_text().replace(PLACE, str(to)))
    for secret in ("key.pem", "admin-token", "session-secret"):  # git keeps no such modes
        (to / "coordinator" / secret).chmod(0o600)
    (to / "client" / "client-key.pem").chmod(0o600)
    return to


def said(name: str) -> Any:
    """What a command printed in those days."""
    text = (FIXTURE / "said" / name).read_text()
    return lines(text) if name.endswith(".jsonl") else json.loads(text)


def lines(out: str) -> Events:
    return [json.loads(line) for line in out.splitlines()]


def together(*asked: tuple[object, ...]) -> list[str]:
    """What commands print that run at the same time."""
    started = [commands.start(str(name), *rest) for name, *rest in asked]
    return [commands.finish(each)[0] for each in started]


@dataclass(frozen=True)
class World:
    """A copy, and a daemon of today over it."""

    folder: Path
    address: str

    @property
    def operators(self) -> tuple[object, ...]:
        return ("--json", "--state", self.folder / "coordinator")

    def clients(self, state: str = "client") -> tuple[object, ...]:
        """Options of a client's command that talks to the daemon."""
        return ("--json", "--server", self.address, "--state", self.folder / state)

    def joins(self, job: str, name: str = "ward-1", state: str = "client") -> tuple[object, ...]:
        who = ("--name", name, "--data", self.folder / "notes.jsonl", *TRAINING)
        return ("edge-client", "join", "--yes", "--job", job, *who, *self.clients(state))

    def show(self, job: str) -> Any:
        out, _ = commands.run("coordinator", "show", job, *self.operators)
        return json.loads(out)

    def metrics(self) -> dict[str, float]:
        """What the daemon counts."""
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", (self.folder / "coordinator.log").read_text())
        assert found, "`serve` says where they are"
        with urllib.request.urlopen(found[0], timeout=60) as reply:
            rows = re.findall(r"^(oneround_\S+) (\S+)$", reply.read().decode(), flags=re.M)
        return {name: float(value) for name, value in rows}

    def uploaded(self) -> float:
        """Bytes of contributions that the daemon has taken."""
        return self.metrics()["oneround_uploaded_bytes_total"]

    def is_settled(self) -> bool:
        """Whether what the old daemon's death left is made up for."""
        now = self.metrics()
        pending = now['oneround_contributions{job="open",verdict="pending"}']
        return not pending and now['oneround_version{job="publishing"}'] == 1

    def box(self, job: str) -> Path:
        """The client's folder of a job."""
        (found,) = (self.folder / "client" / "jobs").glob(f"{job}-????????????")
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = unpack(tmp_path_factory.mktemp("old") / "oneround")
    shutil.copytree(folder / "client", folder / "client-2")  # the same client, for what is done at the same time
    with commands.coordinator(folder / "coordinator", "--metrics", "127.0.0.1:0") as address:
        made = World(folder, address)
        ends = time.monotonic() + PATIENCE
        while not made.is_settled():
            assert time.monotonic() < ends, made.metrics()
            time.sleep(0.1)
        yield made


@pytest.fixture(scope="module")
def shown(world: World) -> dict[str, Any]:
    """What the operator's commands print today."""
    printed = together(*(("coordinator", *command, *world.operators) for command in SHOWN.values()))
    return {name: json.loads(out) for name, out in zip(SHOWN, printed, strict=True)}


@dataclass(frozen=True)
class Joined:
    """What joining told, by job, and how many bytes the daemon took of `half-sent`."""

    told: dict[str, Events]
    uploaded: float

    def last(self, job: str) -> dict[str, dict[str, Any]]:
        """The last of each kind of event."""
        return {event["event"]: event for event in self.told[job]}


@pytest.fixture(scope="module")
def joined(world: World) -> Joined:
    """The old client joins again what it has joined, and a new one joins a new job, from the first pin to the
    publication. Two at a time."""
    before = world.uploaded()
    one, other = together(world.joins("half-sent"), world.joins("published", state="client-2"))
    told, uploaded = {"half-sent": lines(one), "published": lines(other)}, world.uploaded() - before
    commands.run("coordinator", "submit", world.folder / "fresh.toml", *world.operators)
    one, other = together(world.joins("half-trained"), (*world.joins("fresh", "ward-9", "client-9"), "--wait"))
    return Joined(told | {"half-trained": lines(one), "fresh": lines(other)}, uploaded)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy over which nobody runs."""
    return unpack(tmp_path / "oneround")


# ---- the coordinator ----


def test_the_folders_are_what_the_rest_takes_them_for() -> None:
    """Half of everything: else what follows would prove little."""
    state = FIXTURE / "coordinator"
    database = sqlite3.connect(f"file:{state / 'coordinator.sqlite'}?mode=ro&immutable=1", uri=True)
    found = dict(database.execute("select name, state from jobs").fetchall())
    expected = {name: state.removeprefix("STATE_").lower() for name, state in STATES.items()}
    assert found == expected | {"publishing": "publishing"}
    pending = database.execute("select job from contributions where standing = 'pending'").fetchall()
    assert pending == [("open",)]
    database.close()
    making = state / "publications" / "publishing"
    assert (making / "v1.order.json").exists() and (making / "v1.partial" / "adapter.gguf").exists()
    assert not (making / "v1").exists() and not (making / "v1.partial" / "manifest.json").exists()
    (upload,) = (state / "uploads").glob("half-sent.*")
    (sending,) = (FIXTURE / "client" / "jobs").glob("half-sent-*/trained.safetensors")
    assert 0 < upload.stat().st_size == FACTS["committed_bytes"] < sending.stat().st_size
    assert sending.read_bytes().startswith(upload.read_bytes())
    assert list((state / "uploads").glob("open.*")), "of a contribution that was committed as the daemon died"
    assert list((FIXTURE / "client" / "jobs").glob("half-trained-*/training.safetensors"))


def test_every_job_stands_where_it_stood(shown: dict[str, Any]) -> None:
    jobs = {job["spec"]["name"]: job for job in shown["jobs.json"]["jobs"]}
    assert {name: jobs[name]["state"] for name in STATES} == STATES
    for before in said("jobs.json")["jobs"]:
        now = jobs[before["spec"]["name"]]
        for kept in ("spec", "state", "reason", "opened_unix", "deadline_unix", "takes_contributions"):
            assert now[kept] == before[kept], before["spec"]["name"]
    before, now = (_without_folders(each["publications"]) for each in (said("published.json"), jobs["published"]))
    assert now == before and [each["version"] for each in now] == [1, 2]


def _without_folders(publications: Events) -> Events:
    return [{key: value for key, value in each.items() if key != "folder"} for each in publications]


def test_what_clients_gave_is_there_as_it_was_judged(shown: dict[str, Any]) -> None:
    for file in ("open.json", "published.json"):
        now = {client["id"]: client for client in shown[file]["clients"]}
        for before in said(file)["clients"]:
            for kept in ("name", "contribution", "evaluations", "total_steps"):
                assert now[before["id"]].get(kept) == before.get(kept), (file, before["name"])
    given = {client["name"]: client.get("contribution") for client in shown["open.json"]["clients"]}
    verdicts = {name: one["judgement"]["verdict"].removeprefix("VERDICT_") for name, one in given.items() if one}
    assert verdicts == {"ward-1": "ADMITTED", "ward-2": "QUARANTINED", "ward-4": "ADMITTED"}
    clients = {client["name"]: client for client in shown["published.json"]["clients"]}
    assert clients["ward-2"]["contribution"]["may_replace"]
    assert clients["ward-1"]["evaluations"], "what ward-1 measured and told"
    assert shown["published.json"]["comparisons"] == said("published.json")["comparisons"]


def test_a_version_in_the_making_is_made(world: World) -> None:
    status = world.show("publishing")
    (made,) = status["publications"]
    assert made["contributions"] == 2 and status["reason"] == "all 2 contributions are in"
    state = world.folder / "coordinator"
    assert {file.name for file in (state / "publications" / "publishing").iterdir()} == {"v1"}, "the first try is gone"
    assert not list((state / "uploads").glob("open.*"))
    to = world.folder / "publishing"
    out, _ = commands.run("edge-client", "pull", "publishing", "--artifact", "all", "--to", to, *world.clients())
    assert "signed" in commands.events(out)
    manifest = json.loads((to / "manifest.json").read_text())
    assert {given["client"] for given in manifest["contributions"]} == {"ward-2", "ward-3"}
    assert all(verdict["passed"] for verdict in manifest["verification"].values())


def test_who_may_come_in_is_known(shown: dict[str, Any]) -> None:
    tokens = {token["id"]: token for token in shown["tokens.json"]["tokens"]}
    for before in said("tokens.json")["tokens"]:
        for kept in ("job", "note", "created_unix", "expires_unix", "uses", "revoked"):
            assert tokens[before["id"]][kept] == before[kept]
    people = {client["id"]: client for client in shown["clients.json"]["clients"]}
    for before in said("clients.json")["clients"]:
        for kept in ("name", "first_seen_unix", "banned", "why"):
            assert people[before["id"]][kept] == before[kept]
        passes = {each["job"]: each for each in people[before["id"]]["passes"]}
        assert all(passes[each["job"]] == each for each in before["passes"])
    assert {one["name"] for one in people.values() if one["banned"]} == {"ward-8"}


async def test_the_old_invitation_lets_a_new_client_in(world: World) -> None:
    secret = invitation.read(FACTS["invitation"]).token

    async with connected(world.address, world.folder / "crowd") as remote:
        asks = await remote.join_as("ward-11", pb.JoinRequest(job="approved", client_name="ward-11"))
        assert asks.awaits_approval and not asks.lease
        guest = speaking(remote, "ward-10", secret)
        reply = await guest.join(pb.JoinRequest(job="approved", client_name="ward-10"))
        assert reply.lease and reply.job.spec.name == "approved"


async def test_a_deadline_of_then_still_ends_a_round(copy: Path) -> None:
    """In this process, by a clock that is past it."""
    later = max(job["deadline_unix"] for job in said("jobs.json")["jobs"]) + 1.0

    async with running(copy / "coordinator", lambda: later) as (daemon, _), asyncio.timeout(PATIENCE):
        while (status := await daemon.operator.status("open")).state != pb.STATE_PUBLISHED:
            assert status.state in (pb.STATE_OPEN, pb.STATE_PUBLISHING), status.reason
            await asyncio.sleep(0.1)
        assert status.reason == "deadline, with 2 contributions"
        assert status.publications[0].contributions == 2
        while (status := await daemon.operator.status("half-sent")).state != pb.STATE_EXPIRED:
            assert status.state == pb.STATE_OPEN, status.reason
            await asyncio.sleep(0.1)


# ---- the client ----


def test_a_client_knows_where_it_is(copy: Path) -> None:
    out, _ = commands.run("edge-client", "status", "--json", "--state", copy / "client")
    rows = {row["job"]: row for row in json.loads(out)}
    before = {row["job"]: row for row in said("status.json")}
    assert {job: row["stage"] for job, row in rows.items()} == {
        "published": "contributed",
        "open": "contributed",
        "cancelled": "contributed",
        "half-sent": "trained, not sent",
        "half-trained": "joined, not trained",
    }
    folders = {job: row["folder"].replace(f"{PLACE}/again", str(copy)) for job, row in before.items()}
    assert rows == {job: row | {"folder": folders[job]} for job, row in before.items()}
    assert all(rows[job].keys() == row.keys() for job, row in before.items())


def test_an_upload_goes_on_where_it_broke_off(world: World, joined: Joined) -> None:
    events = joined.last("half-sent")
    size = (world.box("half-sent") / "trained.safetensors").stat().st_size
    assert "resumed" in events and "trained" not in events
    assert events["receipt"]["size"] == size
    assert joined.uploaded == size - FACTS["committed_bytes"]
    (given,) = (client["contribution"]["declaration"] for client in world.show("half-sent")["clients"])
    assert given["digest"] == events["receipt"]["digest"]
    commands.run("edge-client", "receipt", "verify", "half-sent", "--state", world.folder / "client")


def test_training_goes_on_from_its_snapshot(world: World, joined: Joined) -> None:
    events = joined.last("half-trained")
    assert "anew" not in events, "today's code takes the run for the same"
    assert events["continued"]["step"] == FACTS["kept_steps"] < events["continued"]["steps"]
    assert events["trained"]["steps"] == events["continued"]["steps"]
    (given,) = (client["contribution"]["declaration"] for client in world.show("half-trained")["clients"])
    assert given["digest"] == events["receipt"]["digest"]
    assert not (world.box("half-trained") / "training.safetensors").exists()


def test_who_has_contributed_gets_the_same_receipt_again(world: World, joined: Joined) -> None:
    events = joined.last("published")
    before, now = (
        json.loads((state / "jobs" / world.box("published").name / "receipt.json").read_text())
        for state in (FIXTURE / "client", world.folder / "client-2")
    )
    assert now == before and events["receipt"]["digest"] == before["digest"]
    assert not {"resumed", "plan", "trained"} & events.keys(), "nothing is done twice"


def test_what_was_agreed_to_still_holds(world: World, joined: Joined) -> None:
    """Its coordinator is known at another address, and its person is asked nothing anew; unless this is another kind of
    machine than that was, of which other things would be told."""
    (now,) = (client["machine"] for client in world.show("fresh")["clients"])
    (then,) = (client["machine"] for client in said("open.json")["clients"] if client["name"] == "ward-1")
    for job in ("half-sent", "half-trained", "published"):
        assert "pinned" not in joined.last(job)
        assert ("terms" not in joined.last(job)) == (now == then)


def test_kept_receipts_hold_without_a_coordinator(copy: Path) -> None:
    client = copy / "client"
    kept = ("--state", client, "--json")
    boxes = {job: next((client / "jobs").glob(f"{job}-*")) for job in ("published", "open", "cancelled")}
    versions = copy / "coordinator" / "publications" / "published"
    verify = ("edge-client", "receipt", "verify")
    first, second, *others = together(
        *((*verify, "published", "--manifest", versions / f"v{n}" / "manifest.json", *kept) for n in (1, 2)),
        *((*verify, job, "--adapter", box / "trained.safetensors", *kept) for job, box in boxes.items()),
    )
    for out in others:
        assert commands.events(out).keys() == {"receipt_holds", "adapter_fits"}
    for version, out in ((1, first), (2, second)):
        part = commands.events(out)["takes_part"]
        assert part["version"] == version and 0 < part["weight"] < 1


def test_old_versions_are_fetched_as_they_were_signed(world: World) -> None:
    folders = {version: world.folder / f"v{version}" for version in (1, 2)}
    all_of_it = ("edge-client", "pull", "published", "--artifact", "all", *world.clients())
    printed = together(*((*all_of_it, "--version", version, "--to", to) for version, to in folders.items()))
    for (version, to), out in zip(folders.items(), printed, strict=True):
        assert commands.events(out)["signed"]["version"] == version
        there = FIXTURE / "coordinator" / "publications" / "published" / f"v{version}"
        names = {file.relative_to(there) for file in there.rglob("*") if file.is_file()}
        assert {file.relative_to(to) for file in to.rglob("*") if file.is_file()} == names
        assert all((to / name).read_bytes() == (there / name).read_bytes() for name in names)
    assert told(lines(printed[1])) == told(said("pull.jsonl"))


def test_what_was_fetched_to_be_used_is_used(copy: Path) -> None:
    """The published model, without a coordinator."""
    chat = ("chat", "published", "--prompt", "Day 1", "--max-tokens", 3, "--state", copy / "client")
    commands.run("edge-client", *chat)


# ---- what scripts rely on ----


def keys(value: object, at: str = "") -> set[str]:
    """Where there is what in a document, as `.jobs[].spec.name str`."""
    if isinstance(value, dict):
        return {f"{at}.{name}" for name in value}.union(*(keys(each, f"{at}.{name}") for name, each in value.items()))
    if isinstance(value, list):
        return set[str]().union(*(keys(each, f"{at}[]") for each in value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {f"{at} {'number' if number else type(value).__name__}"}


@pytest.mark.parametrize("name", SHOWN)
def test_documents_have_the_keys_that_they_had(shown: dict[str, Any], name: str) -> None:
    """And values of the same kinds. There may be more."""
    assert not keys(said(name)) - keys(shown[name])


def told(events: Events) -> list[str]:
    """The events in order, each with its keys; a bar that advances is one, and what only sometimes comes is none."""
    found: list[str] = []
    for event in events:
        name = f"progress {event['what']}" if event["event"] == "progress" else event["event"]
        line = f"{name}: {', '.join(event)}"
        if event["event"] not in SOMETIMES and line not in found[-1:]:
            found.append(line)
    return found


def test_joining_tells_the_events_that_it_told(joined: Joined) -> None:
    before, now = said("join.jsonl"), joined.told["fresh"]
    assert told(now) == told(before)
    sometimes = {event["event"]: event.keys() for event in before if event["event"] in SOMETIMES}
    assert all(event.keys() == sometimes[event["event"]] for event in now if event["event"] in sometimes)


def test_receipts_tell_what_they_told(copy: Path) -> None:
    kept = ("--json", "--state", copy / "client")
    manifest = copy / "coordinator" / "publications" / "published" / "v2" / "manifest.json"
    receipt = ("edge-client", "receipt")
    printed = together(
        (*receipt, "show", "open", *kept), (*receipt, "verify", "published", "--manifest", manifest, *kept)
    )
    for name, out in zip(("receipt-show.jsonl", "receipt-verify.jsonl"), printed, strict=True):
        assert told(lines(out)) == told(said(name))


def test_what_fails_exits_as_it_did(world: World, copy: Path, tmp_path: Path) -> None:
    here, there = ("--state", world.folder / "coordinator"), ("--server", world.address)
    manifest = copy / "coordinator" / "publications" / "published" / "v2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 3'))
    failing: list[tuple[int, tuple[object, ...]]] = [
        (2, ("coordinator", "submit", tmp_path / "nothing.toml", *here)),
        (2, ("edge-client", "pull", "published", "--version", 9, *there, "--state", tmp_path / "one")),
        (3, ("coordinator", "show", "nothing", *here)),
        (3, ("edge-client", "pull", "cancelled", *there, "--state", tmp_path / "two")),
        (4, ("coordinator", "jobs", "--state", copy / "coordinator")),
        (4, ("edge-client", "pull", "published", "--server", "127.0.0.1:1", "--state", tmp_path / "three")),
        (5, ("edge-client", "join", "--data", tmp_path / "nothing", *there, "--state", tmp_path / "four")),
        (5, ("edge-client", "receipt", "verify", "published", "--manifest", manifest, "--state", copy / "client")),
    ]
    started = [(code, commands.start(str(name), *rest)) for code, (name, *rest) in failing]
    for code, process in started:
        commands.finish(process, code=code)
