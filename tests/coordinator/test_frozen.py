"""A job whose A is frozen: B alone goes up, is admitted, and is aggregated by the methods that need that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import adapter, peft, tensors
from converters.adapter import Adapter, LowRank, Shape
from coordinator.jobs import spec
from oneround import stream
from oneround.errors import BadAdapter, UsageError
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd
from tests.daemons import CLIENTS, SPEC, described, judged, nothing, served, trained, version, written

FROZEN = {
    **SPEC,
    "name": "frozen",
    "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"], "freeze_a": True},
    "round": {"min_clients": 3, "target_clients": 3},
    "aggregate": {"method": "ffa"},
}
MODULES = {"q": Shape(6, 4), "v": Shape(3, 4)}


def parsed(method: str, lora: dict[str, object] | None = None, **aggregate: object) -> pb.JobSpec:
    return spec.parse({**SPEC, "lora": lora or {"rank": 2}, "aggregate": {"method": method, **aggregate}})


def test_what_a_job_cannot_do_it_says_before_anybody_trains() -> None:
    frozen: dict[str, object] = {"rank": 2, "freeze_a": True}
    for method in ("ffa", "trimmed-mean", "median"):
        with pytest.raises(UsageError, match="freeze_a = true"):
            parsed(method)
    assert parsed("ffa", frozen).lora.freeze_a and parsed("exact", frozen)
    with pytest.raises(UsageError, match=r"krum.* needs at least 5 contributions, not 2") as caught:
        parsed("krum")
    assert "round.min_clients = 5" in caught.value.hint
    with pytest.raises(UsageError, match="needs at least 3"):
        parsed("trimmed-mean", frozen)
    with pytest.raises(UsageError, match=r"aggregate.density is set, and exact does not use it") as caught:
        parsed("exact", density=0.5)
    assert caught.value.hint == "leave it out; it is for ties and dare"
    for name, value in (("density", 0), ("density", 1.5), ("norm_bound", -1), ("byzantine_clients", -1)):
        with pytest.raises(UsageError, match=f"aggregate.{name} is"):
            parsed("ties", **{name: value})


def made(seed: int, shapes: dict[str, Shape] = MODULES) -> tuple[Adapter, Adapter]:
    """An initial adapter, and one that was trained over it with A frozen."""
    start, rng = adapter.initial(shapes, 2, 0), np.random.default_rng(seed)
    b = {name: rng.standard_normal(one.b.shape).astype(np.float32) for name, one in start.modules.items()}
    return start, Adapter({name: LowRank(one.a, b[name]) for name, one in start.modules.items()}, {"job": "x"})


def test_b_alone_is_read_back_with_the_a_that_it_goes_with(tmp_path: Path) -> None:
    start, trained_ = made(1)
    adapter.write(start, tmp_path / "initial")
    digest = stream.digest(tmp_path / "initial")
    adapter.write(trained_, tmp_path / "b", frozen_a=digest)
    assert {name.split(".")[-2] for name in tensors.read(tmp_path / "b")[0]} == {"lora_B"}
    found = adapter.read(tmp_path / "b", adapter.read(tmp_path / "initial"))
    assert found.metadata["frozen_a"] == digest and found.metadata["job"] == "x"
    for name, update in trained_.modules.items():
        assert np.array_equal(found.modules[name].a, update.a) and np.array_equal(found.modules[name].b, update.b)
    adapter.write(found, tmp_path / "whole")
    assert "frozen_a" not in adapter.read(tmp_path / "whole").metadata


def test_b_alone_that_is_not_sound_is_refused(tmp_path: Path) -> None:
    start, trained_ = made(1)
    file = tmp_path / "b"
    adapter.write(trained_, file, frozen_a="0" * 64)
    with pytest.raises(BadAdapter, match="holds B alone"):
        adapter.read(file)
    with pytest.raises(BadAdapter, match="v has no A"):
        adapter.read(file, replace(start, modules={"q": start.modules["q"]}))
    with pytest.raises(BadAdapter, match="do not share a rank"):
        adapter.read(file, adapter.initial(MODULES, 3, 0))
    both = {f"q.lora_{letter}.weight": np.ones((2, 2), np.float32) for letter in "AB"}
    tensors.write(file, both, {"format": adapter.FORMAT, "frozen_a": "0" * 64})
    with pytest.raises(BadAdapter, match="says that its A was frozen, and holds"):
        adapter.read(file, start)
    tensors.write(file, {}, {"format": adapter.FORMAT, "frozen_a": "0" * 64})
    with pytest.raises(BadAdapter, match="no tensors"):
        adapter.read(file, start)


async def contribute(remote: Crowd, folder: Path, client: str, frozen_a: str | None = None) -> pb.Judgement:
    """A client's whole part; `frozen_a` is what it says that its A was, or empty for a file with A in it."""
    reply = await remote.join_as(client, pb.JoinRequest(job="frozen", client_name=client[:3]))
    update = trained(reply, seed=int(client[0], 16))
    file = folder / client[0]
    digest = reply.job.initial.digest if frozen_a is None else frozen_a
    adapter.write(Adapter(update.modules, described(reply.job)), file, "bfloat16", digest)
    declaration = pb.Declaration(digest=stream.digest(file), size=file.stat().st_size, num_examples=10)
    await remote.upload(reply.lease, declaration, file, nothing)
    return await judged(remote, reply.lease)


async def test_a_round_with_a_frozen(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        await daemon.operator.submit(spec.parse(FROZEN))
        whole = await contribute(remote, tmp_path, "d" * 32, frozen_a="")
        assert whole.verdict == pb.VERDICT_QUARANTINED and "only B is taken" in whole.reason
        other = await contribute(remote, tmp_path, "e" * 32, frozen_a="0" * 64)
        assert other.verdict == pb.VERDICT_QUARANTINED and "only B is taken" in other.reason
        for client in CLIENTS[:3]:
            assert (await contribute(remote, tmp_path, client)).verdict == pb.VERDICT_ADMITTED
        first = await version(daemon, 1, "frozen")
        announced = (await daemon.participation.describe("frozen")).initial
        initial = adapter.read(await daemon.participation.file("frozen", announced.digest))
        for name, update in peft.read(Path(first.publications[0].folder) / "peft").modules.items():
            assert np.array_equal(update.a, initial.modules[name].a), "nobody trained it, and nothing moved it"

        asked = pb.PublishRequest(job="frozen", aggregate=pb.AggregateSpec(method="trimmed-mean"))
        await daemon.operator.publish(asked)
        second = await version(daemon, 2, "frozen")
        manifest = json.loads((Path(second.publications[1].folder) / "manifest.json").read_text())
        assert manifest["method"] == "trimmed-mean" and manifest["job"]["aggregate"]["byzantine_clients"] == 1
        assert [given["weight"] for given in manifest["contributions"] if given["weight"]] == [1 / 3] * 3

        for refused, why in (
            (pb.AggregateSpec(method="krum"), "needs at least 5 contributions, not 3"),
            (pb.AggregateSpec(method="ffa", density=0.5), "ffa does not use it"),
        ):
            with pytest.raises(UsageError, match=why):
                await daemon.operator.publish(pb.PublishRequest(job="frozen", aggregate=refused))


async def test_what_is_in_and_cannot_be_taken_is_refused_at_once(tmp_path: Path) -> None:
    """Nothing is begun: the round stays as it is."""

    async with served(tmp_path / "state") as (daemon, remote):
        for client, rank in ((CLIENTS[0], 1), (CLIENTS[1], 2)):
            reply = await remote.join_as(client, pb.JoinRequest(job="notes", client_name=client[:3]))
            modules = {
                name: LowRank(one.a[:rank], one.b[:, :rank]) for name, one in trained(reply, rank).modules.items()
            }
            file, declaration = written(Adapter(modules, described(reply.job)), tmp_path)
            await remote.upload(reply.lease, declaration, file, nothing)
            assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
        for method, why in (("fedavg", "of one rank"), ("fedex", "of one rank"), ("ffa", "freeze_a")):
            with pytest.raises(UsageError, match=why):
                await daemon.operator.publish(pb.PublishRequest(job="notes", aggregate=pb.AggregateSpec(method=method)))
        status = await daemon.operator.status("notes")
        assert status.state == pb.STATE_OPEN and not status.publications
