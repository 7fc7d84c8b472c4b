"""Events: a round's, in order, once each, together with what they tell of; and who gets to see them."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from sqlalchemy import text

from coordinator import events, metrics
from coordinator import round as rounds
from coordinator.cli import client as control
from coordinator.cli import tables
from coordinator.jobs import spec as job
from coordinator.round import Round, Rules, State
from coordinator.storage import backup
from coordinator.storage import events as event_rows
from coordinator.storage.database import engine
from coordinator.storage.schema import Client, Contribution, Job
from coordinator.storage.store import Store
from oneround.errors import Denied, NotFound
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd, me
from tests.daemons import ALICE, BOB, SPEC, join, judged, nothing, served, trained, version, written

RULES = Rules(min_clients=2, target_clients=3, deadline=1000.0)
OPEN = Round(RULES)
PUBLISHING = replace(OPEN, state=State.PUBLISHING, admitted=2)
PUBLISHED = replace(OPEN, state=State.PUBLISHED, admitted=2, version=1)


# ---- which they are ----


@pytest.mark.parametrize(
    ("before", "trigger", "now", "kinds"),
    [
        (OPEN, rounds.Tick(), 10, []),
        (replace(OPEN, admitted=3), rounds.Tick(), 10, ["version_started"]),
        (OPEN, rounds.Tick(), 1000, ["round_ended"]),
        (replace(OPEN, admitted=1), rounds.CloseByHand(), 10, ["round_closed", "version_started"]),
        (OPEN, rounds.CloseByHand(), 10, ["round_ended"]),
        (PUBLISHED, rounds.CloseByHand(), 10, ["round_closed"]),
        (replace(PUBLISHED, closed_at=5), rounds.CloseByHand(), 10, []),
        (PUBLISHING, rounds.CancelByHand(), 10, ["round_ended"]),
        (PUBLISHED, rounds.PublishByHand("why"), 10, ["version_started"]),
        (PUBLISHING, rounds.PublishingFailed("why"), 10, ["version_failed"]),
        (replace(PUBLISHING, version=1), rounds.PublishingFailed("why"), 10, ["version_failed"]),
        (PUBLISHING, rounds.Published(), 10, []),  # Store.publish has more to say of it
    ],
)
def test_what_a_transition_tells(before: Round, trigger: rounds.Trigger, now: float, kinds: list[str]) -> None:
    after = rounds.apply(before, trigger, now)
    assert [events.kind(event) for event in events.of_transition(before, trigger, after)] == kinds


def test_every_kind_has_a_sentence() -> None:
    examples = [
        pb.Event(contribution_judged=pb.ContributionJudged(judgement=pb.Judgement(verdict=pb.VERDICT_ADMITTED))),
        pb.Event(decided_by_hand=pb.DecidedByHand(decision=pb.DECISION_EXCLUDE, why="wrong folder")),
        pb.Event(round_ended=pb.RoundEnded(state=pb.STATE_EXPIRED, reason="deadline")),
    ]
    special = {events.kind(event) for event in examples}
    for name in events.KINDS:
        if name not in special:
            event = pb.Event()
            getattr(event, name).SetInParent()
            examples.append(event)
    assert {events.kind(event) for event in examples} == set(events.KINDS)
    sentences = [events.sentence(event) for event in examples]
    assert all(sentences) and len(set(sentences)) == len(sentences)
    assert "excluded by the operator: wrong folder" in sentences and "round expired: deadline" in sentences


# ---- in the database ----


def job_row(name: str = "notes") -> Job:
    announced = pb.Job(spec=job.parse({**SPEC, "name": name}), deadline_unix=1e6, id="0" * 32)
    return Job(
        name=name,
        job=announced,
        base_folder="",
        opened=1.0,
        state="open",
        reason="",
        closed_at=None,
        tried_at=0.0,
        deleted=False,
    )


def joined(store: Store, client_id: str, at: float, name: str = "notes") -> Client:
    machine = pb.Machine(backend="torch", device="cpu")
    return store.join(Client.joining(name, client_id, f"client {client_id[:2]}", machine, at))


def contributed(store: Store, client: Client, at: float, digest: str = "a") -> Contribution:
    declaration = pb.Declaration(digest=digest * 64, size=100, num_examples=7)
    opened = pb.Event(upload_opened=pb.UploadOpened(revision=1, size=100))
    before = [event_rows.NewEvent(opened, at - 0.5, client.client_id)]
    return store.contribute(Contribution.sent(client, declaration, at), before)


def progress(client: Client, step: int) -> dict[str, object]:
    return {"lease": client.lease, "last_seen": 3.0, "step": step, "total_steps": 9, "loss": 1, "tokens_per_second": 1}


def kinds(store: Store, name: str = "notes") -> list[str]:
    return [events.kind(event) for event in store.events(name)]


def whole_round(store: Store) -> None:
    """Two join, train, send and are judged; one is judged otherwise by the cohort, one leaves; the operator closes."""
    store.add_job(job_row())
    alice, bob = joined(store, ALICE, 2.0), joined(store, BOB, 2.5)
    joined(store, ALICE, 2.6)
    first = event_rows.NewEvent(pb.Event(first_step=pb.FirstStep(total_steps=9)), 3.0, ALICE)
    for _ in range(3):
        store.record_progress([progress(alice, 1)], {"notes": [first]})
    for client, at in ((alice, 4.0), (bob, 5.0)):
        kept = contributed(store, client, at)
        assert store.record_soundness(kept, "", at + 0.1).verdict == "admitted"
        store.record_soundness(kept, "looked at again after a crash", at + 0.2)
    store.advance("notes", rounds.CloseByHand(), 6.0)
    store.record_delay("notes", "the disk is full", 6.1)
    store.record_delay("notes", "the disk is still full", 6.2)
    store.advance("notes", rounds.PublishingFailed("why"), 7.0)
    store.advance("notes", rounds.PublishByHand("again"), 8.0)
    made = pb.Publication(version=1, contributions=1)
    store.publish("notes", made, {ALICE: ("admitted", ""), BOB: ("quarantined", "too long")}, 9.0)
    store.publish("notes", made, {}, 9.1)  # again, after a crash
    for _ in range(2):
        store.report(alice, pb.Evaluation(version=1, tokens=1), 10.0)
    decision = pb.JudgeRequest(decision=pb.DECISION_ADMIT, why="it is meant")
    store.decide("notes", BOB, decision, 11.0)
    for _ in range(2):
        store.withdraw(bob, 12.0)


WHOLE_ROUND = [
    ("round_opened", "", 1.0),
    ("joined", ALICE, 2.0),
    ("joined", BOB, 2.5),
    ("first_step", ALICE, 3.0),
    ("upload_opened", ALICE, 3.5),
    ("contribution_received", ALICE, 4.0),
    ("contribution_judged", ALICE, 4.1),
    ("upload_opened", BOB, 4.5),
    ("contribution_received", BOB, 5.0),
    ("contribution_judged", BOB, 5.1),
    ("quorum_reached", "", 5.1),
    ("round_closed", "", 6.0),
    ("version_started", "", 6.0),
    ("version_delayed", "", 6.1),
    ("version_failed", "", 7.0),
    ("version_started", "", 8.0),
    ("contribution_judged", BOB, 9.0),
    ("version_published", "", 9.0),
    ("evaluation_reported", ALICE, 10.0),
    ("decided_by_hand", BOB, 11.0),
    ("withdrawn", BOB, 12.0),
]


def check_whole_round(store: Store) -> None:
    told = store.events("notes")
    assert [(events.kind(event), event.client, event.at_unix) for event in told] == [
        (name, public_id(client), at) for name, client, at in WHOLE_ROUND
    ]
    assert [event.number for event in told] == list(range(1, len(told) + 1))
    assert {event.client_name for event in told} == {"", "client aa", "client bb"}
    judged_anew = told[16].contribution_judged
    assert (judged_anew.version, judged_anew.judgement.reason) == (1, "too long")
    assert (told[14].version_failed.version, told[14].version_failed.reason) == (1, "why")


def test_a_whole_round_in_order(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/rows.sqlite")
    whole_round(store)
    check_whole_round(store)
    assert store.events("notes", after=19, limit=1)[0].number == 20
    assert [event.number for event in store.newest_events("notes", 2)] == [20, 21]
    assert store.event_counts()["notes", "joined"] == 2
    store.close()


@pytest.mark.postgres
def test_a_whole_round_in_postgresql(postgres: str) -> None:
    store = Store(postgres)
    whole_round(store)
    check_whole_round(store)
    store.add_job(job_row("other"))
    assert kinds(store, "other") == ["round_opened"]
    store.close()


def test_each_job_counts_its_own_and_takes_them_along(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/rows.sqlite")
    for name in ("notes", "other"):
        store.add_job(job_row(name))
        joined(store, ALICE, 2.0, name)
    store.advance("notes", rounds.CancelByHand(), 3.0)
    store.mark_deleted("notes")
    store.forget("notes")
    assert store.events("notes") == [] and set(store.event_counts()) == {("other", "round_opened"), ("other", "joined")}
    store.add_job(job_row("notes"))
    assert [event.number for event in store.events("notes")] == [1]
    store.close()


def test_what_is_not_committed_leaves_no_event(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/rows.sqlite")
    store.add_job(job_row())
    alice = joined(store, ALICE, 2.0)
    before = kinds(store)
    with pytest.raises(NotFound), store.database.writes() as session:
        event_rows.record(session, "notes", event_rows.NewEvent(pb.Event(withdrawn=pb.Withdrawn()), 3.0, ALICE))
        raise NotFound("it fails after the event, and before the commit")
    with pytest.raises(NotFound):
        store.report(alice, pb.Evaluation(version=7), 3.0)
    assert kinds(store) == before
    contributed(store, alice, 4.0)
    assert contributed(store, alice, 5.0, "b").digest == "a" * 64, "the first one stands"
    assert kinds(store) == [*before, "upload_opened", "contribution_received"]
    store.close()


def test_an_older_database_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/rows.sqlite"
    store = Store(url)
    store.add_job(job_row())
    joined(store, ALICE, 2.0)
    store.close()
    opened = engine(url)
    with opened.execution_options(writes=True).begin() as connection:
        connection.execute(text("DROP TABLE events"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    opened.dispose()
    store = Store(url)
    assert store.events("notes") == []
    joined(store, ALICE, 3.0)  # who joined before there were events joins again
    assert kinds(store) == []
    joined(store, BOB, 4.0)
    assert [(event.number, events.kind(event)) for event in store.events("notes")] == [(1, "joined")]
    store.close()


# ---- behind a real server ----


async def sent(remote: Crowd, folder: Path, client: str, seed: int) -> str:
    """A client trains, contributes and is judged; its lease."""
    reply = await join(remote, client)
    for step in (0, 1, 2):
        await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease, step=step, total_steps=2, loss=1.0))
    file, declaration = written(trained(reply, seed), folder / client[:5])
    await remote.upload(reply.lease, declaration, file, nothing)
    await judged(remote, reply.lease)
    return reply.lease


def shown(status: pb.JobStatus) -> str:
    """As `coordinator show` has it."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(tables.job(status))
    return captured.get()


async def test_what_operators_see_and_others_do_not(tmp_path: Path) -> None:
    state, kept = tmp_path / "state", tmp_path / "kept"

    async with served(state) as (daemon, remote):
        lease = await sent(remote, tmp_path, ALICE, 0)
        await sent(remote, tmp_path, BOB, 1)
        await daemon.operator.close("notes")
        await version(daemon, 1, "notes")
        numbers = {"base_loss": 3.0, "own_loss": 2.5, "published_loss": 2.4}
        await remote.report(lease, pb.Evaluation(version=1, tokens=100, **numbers))
        await asyncio.to_thread(backup.backup, state, kept)

        status = await control.show(state, "notes")
        alice, bob = (public_id(me(label).client_id) for label in (ALICE, BOB))
        per_client = ["joined", "first_step", "upload_opened", "contribution_received", "contribution_judged"]
        for client, extra in ((alice, ["evaluation_reported"]), (bob, [])):
            own = [events.kind(event) for event in status.events if event.client == client]
            assert [name for name in own if name != "contribution_judged" or own.count(name) == 1][:5] == per_client
            assert own[-1:] == extra or not extra
        whole = [events.kind(event) for event in status.events if not event.client]
        assert whole == ["round_opened", "quorum_reached", "round_closed", "version_started", "version_published"]
        assert "version 1 published" in shown(status) and "reported an evaluation" in shown(status)
        for secret in (lease, me(ALICE).client_id):
            assert secret.encode() not in status.SerializeToString()

        (listed,) = (await remote.jobs()).jobs
        assert not listed.events and not (await remote.job("notes")).events
        registry = CollectorRegistry()
        registry.register(metrics.Jobs(daemon.all_statuses, daemon.event_counts))
        page = generate_latest(registry).decode()
        assert 'oneround_events_total{job="notes",kind="joined"} 2.0' in page
        assert 'oneround_events_total{job="notes",kind="version_failed"} 0.0' in page
        assert 'oneround_version{job="notes"} 1.0' in page

    backup.restore(kept, tmp_path / "again")
    stores = [Store(f"sqlite:///{folder / 'coordinator.sqlite'}") for folder in (state, tmp_path / "again")]
    before, after = (store.events("notes") for store in stores)
    assert before == after and before
    for store in stores:
        store.close()


async def test_a_client_that_repeats_itself_is_told_once(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        for number in range(5):
            await join(remote)
            for step in (0, 1):
                await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease, step=step, total_steps=9))
            declared = pb.Declaration(digest=f"{number:064x}", size=100, num_examples=1)
            await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declared))
            await remote.withdraw(reply.lease)
        with pytest.raises(Denied):
            await remote.heartbeat(pb.HeartbeatRequest(lease="0" * 64, step=1))
        told = [events.kind(event) for event in (await daemon.operator.status("notes")).events]
        assert told == ["round_opened", "joined", "first_step", "upload_opened", "withdrawn"]


def test_the_json_of_show_has_them_beside_what_it_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coordinator.cli.output import print_json

    store = Store(f"sqlite:///{tmp_path}/rows.sqlite")
    whole_round(store)
    print_json(pb.JobStatus(events=store.events("notes")))
    document = json.loads(capsys.readouterr().out)
    assert {"clients", "publications", "comparisons", "events"} <= document.keys()
    last = document["events"][-1]
    assert (last["number"], last["client"], last["withdrawn"]) == (21, public_id(BOB), {"revision": 1})
    store.close()
