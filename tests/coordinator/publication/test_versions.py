"""A job's life after its first publication, and around it: late contributions, decisions by hand, other methods."""

import asyncio
import re
from pathlib import Path

import grpc
import numpy as np
import pytest

from converters.adapter import Adapter, LowRank
from coordinator.jobs import spec
from coordinator.publication import diff
from oneround.errors import Conflict, NotFound, Refused, UsageError
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd
from tests.daemons import (
    ALICE,
    BOB,
    CLIENTS,
    SPEC,
    join,
    judged,
    manifest,
    nothing,
    served,
    trained,
    version,
    written,
)
from tests.waiting import LONG

LATE = {**SPEC, "name": "late", "round": {"min_clients": 2, "target_clients": 4, "renew_every": "1s"}}


async def contribute(remote: Crowd, folder: Path, client: str, seed: int, job: str = "late", times: float = 1.0) -> str:
    """A client's whole part in a job; returns its lease. All updates point about the same way."""
    reply = await remote.join_as(client, pb.JoinRequest(job=job, client_name=f"client-{client[0]}"))
    made, common = trained(reply, seed), trained(reply, 99)
    factor = np.float32(0.02 * times)
    modules = {
        name: LowRank(factors.a, (factors.b + common.modules[name].b) * factor)
        for name, factors in made.modules.items()
    }
    file, declaration = written(Adapter(modules, made.metadata), folder / client[0])
    await remote.upload(reply.lease, declaration, file, nothing)
    await judged(remote, reply.lease)
    return reply.lease


def decide(client: str, decision: pb.Decision, why: str = "", job: str = "late") -> pb.JudgeRequest:
    return pb.JudgeRequest(job=job, client=client, decision=decision, why=why)


async def test_versions_of_a_job(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        await daemon.operator.submit(spec.parse(LATE))
        for seed, client in enumerate(CLIENTS[:3]):
            await contribute(remote, tmp_path, client, seed)
        await contribute(remote, tmp_path, CLIENTS[3], 3, times=-1)  # as many as the target, one of them turned round
        first = await version(daemon, 1)
        assert first.takes_contributions and first.publications[0].contributions == 3
        shown = {client.name: client for client in (await daemon.operator.status("late")).clients}
        turned = shown["client-d"].contribution.judgement
        assert turned.verdict == pb.VERDICT_QUARANTINED and "cosine" in turned.reason and not turned.by_hand
        assert manifest(first)["client-d"]["weight"] == 0.0

        # One that comes later makes a version by itself.
        lease = await contribute(remote, tmp_path, CLIENTS[4], 4)
        second = await version(daemon, 2)
        assert second.publications[1].contributions == 4
        assert manifest(second)["client-e"]["verdict"] == "admitted"

        # The operator takes one out and lets another in; both show in the manifests.
        await daemon.operator.judge(decide("client-b", pb.DECISION_EXCLUDE, "wrong folder"))
        third = await version(daemon, 3)
        assert manifest(third)["client-b"]["reason"] == "excluded by the operator: wrong folder"
        assert manifest(third)["client-d"]["verdict"] == "quarantined"
        await daemon.operator.judge(decide(shown["client-d"].id, pb.DECISION_ADMIT, "it is meant"))
        fourth = await version(daemon, 4)
        assert manifest(fourth)["client-d"]["verdict"] == "admitted"
        assert fourth.publications[3].contributions == 4

        # Another method, with nobody training; and a client that leaves.
        await daemon.operator.publish(
            pb.PublishRequest(job="late", aggregate=pb.AggregateSpec(method="fedavg"), adapter_rank=1)
        )
        fifth = await version(daemon, 5)
        assert fifth.publications[4].aggregate.method == "fedavg"
        assert fifth.publications[4].aggregate.server_learning_rate == 1.0
        await remote.withdraw(lease)
        sixth = await version(daemon, 6)
        assert sixth.publications[5].aggregate.method == "exact", "the job's own again"
        assert "withdrawn by its client" in str(manifest(sixth)["client-e"]["reason"])

        # Old ones stay, and can be had.
        folders = [Path(publication.folder) for publication in sixth.publications]
        assert all((folder / "late-f16.gguf").exists() for folder in folders)
        old = {artifact.name: artifact for artifact in sixth.publications[0].artifacts}["late-f16.gguf"]
        await remote.download("late", old, tmp_path / "old.gguf", nothing)
        assert (tmp_path / "old.gguf").read_bytes() == (folders[0] / "late-f16.gguf").read_bytes()

        # What changed between two of them.
        found = diff.compare(folders[0], folders[1])
        assert "client-e" in str(found)

        # Closed, nothing more is taken; deleted, nothing is left.
        await daemon.operator.close("late")
        with pytest.raises(Refused, match="takes no more"):
            await contribute(remote, tmp_path, CLIENTS[5], 5)
        await daemon.operator.delete("late")
        with pytest.raises(NotFound):
            await daemon.operator.status("late")
        state = tmp_path / "state"
        assert not (state / "publications" / "late").exists() and not list((state / "uploads").iterdir())
        assert len(list((state / "blobs").iterdir())) == 1, "the other job's initial adapter"


async def test_decisions_that_cannot_be(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        with pytest.raises(NotFound, match="no client 'nobody'"):
            await daemon.operator.judge(decide("nobody", pb.DECISION_ADMIT, job="notes"))
        with pytest.raises(Refused, match="has not contributed"):
            await daemon.operator.judge(decide("aaaaa", pb.DECISION_ADMIT, job="notes"))
        with pytest.raises(UsageError, match="no decision"):
            await daemon.operator.judge(pb.JudgeRequest(job="notes", client="aaaaa"))
        file, declaration = written(Adapter(trained(reply).modules, {"base": "0"}), tmp_path)
        await remote.upload(reply.lease, declaration, file, nothing)
        await judged(remote, reply.lease)
        with pytest.raises(Refused, match="cannot take part: trained over base"):
            await daemon.operator.judge(decide("aaaaa", pb.DECISION_ADMIT, job="notes"))
        with pytest.raises(Refused, match="no contribution that takes part"):
            await daemon.operator.publish(pb.PublishRequest(job="notes"))
        with pytest.raises(UsageError, match=r"aggregate\.method"):
            await daemon.operator.publish(pb.PublishRequest(job="notes", aggregate=pb.AggregateSpec(method="magic")))
        with pytest.raises(Refused, match="is open"):
            await daemon.operator.delete("notes")
        twin = await remote.join_as(BOB, pb.JoinRequest(job="notes", client_name="aaaaa"))
        assert twin.lease != reply.lease
        with pytest.raises(Refused, match="2 clients are called"):
            await daemon.operator.judge(decide("aaaaa", pb.DECISION_EXCLUDE, job="notes"))


async def test_a_method_that_needs_more_than_came_leaves_the_way_to_another(tmp_path: Path) -> None:
    few = {**SPEC, "name": "few", "round": {"min_clients": 5, "target_clients": 0}, "aggregate": {"method": "krum"}}

    async with served(tmp_path / "state") as (daemon, remote):
        await daemon.operator.submit(spec.parse(few))
        for seed, client in enumerate(CLIENTS[:2]):
            await contribute(remote, tmp_path, client, seed, "few")
        await daemon.operator.close("few")
        async with asyncio.timeout(LONG):
            async for status in daemon.statuses.watch("few"):
                if status.state == pb.STATE_FAILED:
                    break
        why = r"krum \(byzantine clients 1\) needs at least 5 contributions, not 2"
        assert re.fullmatch(f"{why}; `coordinator publish few --method exact` takes any", status.reason)
        with pytest.raises(UsageError, match=why) as caught:
            await daemon.operator.publish(pb.PublishRequest(job="few"))
        assert caught.value.hint == "--method exact takes any"
        await daemon.operator.publish(pb.PublishRequest(job="few", aggregate=pb.AggregateSpec(method="exact")))
        made = await version(daemon, 1, "few")
        assert made.publications[0].contributions == 2 and not made.takes_contributions


async def test_another_contribution_only_where_the_operator_lets_it(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        file, declaration = written(trained(reply), tmp_path / "one")
        first = await remote.upload(reply.lease, declaration, file, nothing)
        other, another = written(trained(reply, seed=1), tmp_path / "two")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=another))
        assert caught.value.code().name == Conflict.status
        await daemon.operator.judge(decide("aaaaa", pb.DECISION_LET_REPLACE, job="notes"))
        assert (await join(remote)).may_replace
        assert await remote.upload(reply.lease, declaration, file, nothing) == first, "the same one is not another"
        second = await remote.upload(reply.lease, another, other, nothing)
        assert second.digest == another.digest
        assert not (await join(remote)).may_replace
        status = await daemon.operator.status("notes")
        assert [client.contribution.declaration.digest for client in status.clients] == [another.digest]
        assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED


async def test_leaving_and_coming_back(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        file, declaration = written(trained(reply), tmp_path)
        await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
        await remote.withdraw(reply.lease)
        assert (await daemon.operator.status("notes")).clients[0].phase == pb.PHASE_WITHDRAWN
        answer = await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease))
        assert (answer.directive, answer.reason) == (pb.DIRECTIVE_STOP, "this client has withdrawn")
        assert (await join(remote)).lease == reply.lease
        await remote.upload(reply.lease, declaration, file, nothing)
        assert (await daemon.operator.status("notes")).clients[0].phase == pb.PHASE_CONTRIBUTED
        with pytest.raises(Refused, match="not known"):
            await remote.withdraw("0" * 64)


async def test_a_cancelled_job_tells_its_clients(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        assert (await daemon.operator.cancel("notes")).state == pb.STATE_CANCELLED
        answer = await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease))
        assert answer.directive == pb.DIRECTIVE_STOP and "cancelled" in answer.reason
        with pytest.raises(Refused, match="takes no more"):
            await join(remote, BOB)
        await daemon.operator.delete("notes")
        assert (await daemon.operator.submit(spec.parse(SPEC))).state == pb.STATE_OPEN, "the name is free again"
        assert (await join(remote, ALICE)).lease != reply.lease
