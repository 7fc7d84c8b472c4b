"""Rounds in a chain: each job starts from what the last one published, or from an adapter's file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import adapter, peft
from converters.adapter import Adapter, LowRank
from coordinator.cli import tables
from coordinator.daemon import Daemon
from coordinator.jobs import base_model, warm_start
from coordinator.jobs import spec as job
from oneround import stream
from oneround.errors import BadData, OneroundError, UsageError
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd
from tests.coordinator.aggregate.references import deltas
from tests.daemons import CLIENTS, SPEC, described, judged, manifest, nothing, served, version

Moved = Callable[[LowRank, np.random.Generator], LowRank]
FIRST: dict[str, Any] = {
    **SPEC,
    "name": "first",
    "round": {"min_clients": 2, "target_clients": 2},
    "upload": {"dtype": "float32"},
}


def after(start: str, name: str = "second", clients: int = 2, **changes: Any) -> pb.JobSpec:
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"], "start_from": start, **changes.pop("lora", {})}
    rounds = {"min_clients": 2, "target_clients": clients}
    return job.parse({**FIRST, "name": name, "lora": lora, "round": rounds, **changes})


def little(first: LowRank, rng: np.random.Generator, times: float = 1.0) -> LowRank:
    """A step from where the adapter is, which points about the same way for everybody."""
    common = np.random.default_rng(99).standard_normal(first.b.shape)
    step = 0.002 * times * (common + 0.5 * rng.standard_normal(first.b.shape))
    return LowRank(first.a, first.b + step.astype(np.float32))


async def contribute(
    daemon: Daemon, remote: Crowd, folder: Path, client: str, name: str, moved: Moved = little
) -> tuple[Adapter, pb.Judgement]:
    """A client's whole part in a job; what it sent, and what was made of it at first."""
    reply = await remote.join_as(client, pb.JoinRequest(job=name, client_name=f"client-{client[0]}"))
    start = adapter.read(await daemon.participation.file(name, reply.job.initial.digest))
    rng = np.random.default_rng(int(client[0], 16))
    sent = Adapter(
        {module: moved(start.modules[module], rng) for module in sorted(start.modules)}, described(reply.job)
    )
    file, frozen_a = folder / f"{name}-{client[0]}", reply.job.initial.digest if reply.job.spec.lora.freeze_a else ""
    adapter.write(sent, file, reply.job.spec.upload.dtype, frozen_a)
    declaration = pb.Declaration(digest=stream.digest(file), size=file.stat().st_size, num_examples=10)
    await remote.upload(reply.lease, declaration, file, nothing)
    return sent, await judged(remote, reply.lease)


def published(status: pb.JobStatus) -> dict[str, np.ndarray]:
    return deltas(peft.read(Path(status.publications[-1].folder) / "peft"))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)


def mean(sent: list[Adapter]) -> dict[str, np.ndarray]:
    whole = [deltas(one) for one in sent]
    return {name: np.mean([one[name] for one in whole], axis=0) for name in whole[0]}


async def test_three_rounds(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        await daemon.operator.submit(job.parse(FIRST))
        with pytest.raises(UsageError, match="'first', from which this one is to start, has published nothing yet"):
            await daemon.operator.submit(after("first"))
        for client in CLIENTS[:2]:
            await contribute(daemon, remote, tmp_path, client, "first", lambda one, rng: little(one, rng, times=50))
        await version(daemon, 1, "first")

        # What was stacked has another rank than the next round's; the error says what to run.
        with pytest.raises(UsageError, match=r"version 1 of job 'first' has rank 4 .* lora.rank is 2") as caught:
            await daemon.operator.submit(after("first"))
        assert caught.value.hint.startswith("coordinator publish first --adapter-rank 2, then submit")
        await daemon.operator.publish(pb.PublishRequest(job="first", adapter_rank=2))
        one = await version(daemon, 2, "first")

        # The second begins with exactly that, and says so.
        status = await daemon.operator.submit(after("first", clients=5))
        folder = Path(one.publications[-1].folder)
        described_ = await daemon.participation.describe("second")
        start = adapter.read(await daemon.participation.file("second", described_.initial.digest))
        assert_same(deltas(start), published(one))
        spec = after("./published")
        prepared = base_model.prepare(spec.model, tmp_path / "bases")
        for name in ("peft", "mlx", "adapter.gguf"):
            source = warm_start.WarmStart(folder / name, pb.Start())
            assert_same(deltas(warm_start.read(source, spec, prepared, start.shapes)), published(one))
        elsewhere = replace(source, base_fingerprint="0" * 64)
        with pytest.raises(UsageError, match="has another base model"):
            warm_start.read(elsewhere, spec, prepared, start.shapes)
        digest = stream.digest(folder / "manifest.json")
        expected = pb.Start(
            job="first", job_id=(await daemon.participation.describe("first")).id, version=2, digest=digest
        )
        assert described_.started_from == status.started_from == expected
        assert tables.start(status.started_from, status.spec) == f"version 2 of first (manifest {digest})"
        assert (await daemon.operator.submit(after("first", clients=5))).spec == status.spec, "again is nothing new"

        def turned(first: LowRank, rng: np.random.Generator) -> LowRank:
            return little(first, rng, times=-1)

        def lower(first: LowRank, rng: np.random.Generator) -> LowRank:
            return LowRank(first.a[:1], first.b[:, :1])

        sent = [(await contribute(daemon, remote, tmp_path, client, "second"))[0] for client in CLIENTS[:4]]
        _, found = await contribute(daemon, remote, tmp_path, "9" * 32, "second", lower)
        assert found.verdict == pb.VERDICT_QUARANTINED and "has rank 1, the job asks for 2" in found.reason
        await contribute(daemon, remote, tmp_path, CLIENTS[4], "second", turned)
        two = await version(daemon, 1, "second")
        assert_same(published(two), mean(sent))
        listed = manifest(two)
        assert listed["client-e"]["verdict"] == "quarantined" and "cosine" in str(listed["client-e"]["reason"])
        change = [{name: whole[name] - deltas(start)[name] for name in whole} for whole in map(deltas, sent)]
        norms = [np.sqrt(sum(np.square(part).sum() for part in whole.values())) for whole in change]
        for client, norm in zip("abcd", norms, strict=True):
            assert listed[f"client-{client}"]["norm"] == pytest.approx(norm, rel=1e-3), "of the change"
        told = json.loads((Path(two.publications[0].folder) / "manifest.json").read_text())
        assert told["started_from"] == {"job": "first", "job_id": expected.job_id, "version": 2, "digest": digest}
        card = (Path(two.publications[0].folder) / "README.md").read_text()
        assert f"It started from version 2 of `first` (SHA-256 of its manifest.json: `{digest}`)" in card

        # Another average of the same is about what was changed, too; and the job stands on its own files.
        copy = tmp_path / "mine"
        shutil.copytree(folder / "peft", copy)
        await daemon.operator.delete("first")
        again = pb.AggregateSpec(method="task-arithmetic", server_learning_rate=1.5)
        await daemon.operator.publish(pb.PublishRequest(job="second", aggregate=again))
        faster = await version(daemon, 2, "second")
        before, middle = deltas(start), mean(sent)
        assert_same(published(faster), {name: before[name] + 1.5 * (middle[name] - before[name]) for name in before})

        # A third, from a folder, with A frozen as it is there.
        frozen = after(str(copy), "third", lora={"freeze_a": True}, aggregate={"method": "ffa"})
        status = await daemon.operator.submit(frozen)
        assert (
            not status.started_from.job
            and status.started_from.digest == (await daemon.participation.describe("third")).initial.digest
        )
        sent = [(await contribute(daemon, remote, tmp_path, client, "third"))[0] for client in CLIENTS[:2]]
        last = await version(daemon, 1, "third")
        assert_same(published(last), mean(sent))
        made, given = (peft.read(folder) for folder in (Path(last.publications[0].folder) / "peft", copy))
        assert all(np.array_equal(made.modules[name].a, given.modules[name].a) for name in given.modules)
        assert "It started from an adapter" in (Path(last.publications[0].folder) / "README.md").read_text()


async def test_what_a_job_cannot_start_from(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, _):
        described_ = await daemon.participation.describe("notes")
        fresh = adapter.read(await daemon.participation.file("notes", described_.initial.digest))
        fits = adapter.initial(fresh.shapes, 2, 1)
        (tmp_path / "empty").mkdir()
        first = min(fresh.modules)

        def file(name: str, made: Adapter) -> str:
            adapter.write(made, tmp_path / name)
            return str(tmp_path / name)

        nan = {first: LowRank(fits.modules[first].a, np.full_like(fits.modules[first].b, np.nan))}
        part = {name: fits.modules[name] for name in sorted(fits.modules)[1:]}
        cases: list[tuple[str, type[OneroundError], str, str]] = [
            ("nowhere", UsageError, "there is no such job here", "./nowhere"),
            ("notes", UsageError, "published nothing yet", "coordinator show notes"),
            (str(tmp_path / "gone"), BadData, "nothing is there", "relative to the job file"),
            (str(tmp_path / "empty"), BadData, "cannot start from .*no adapter in a format", "PEFT"),
            (file("rank", adapter.initial(fresh.shapes, 3, 1)), UsageError, "has rank 3 in .*lora.rank is 2", "= 3"),
            (file("part", Adapter(part)), BadData, f"lacks 1 of the job's modules, {first}", "target_modules"),
            (file("nan", Adapter({**fits.modules, **nan})), BadData, "NaN", ""),
            (file("base", Adapter(fits.modules, {"base": "0" * 64})), BadData, "trained over base 000", ""),
        ]
        for start, kind, why, hint in cases:
            with pytest.raises(kind, match=why) as caught:
                await daemon.operator.submit(after(start))
            assert hint in caught.value.hint, start
        assert [one.spec.name for one in daemon.all_statuses()] == ["notes"], "nothing is left of them"
        assert not list((tmp_path / "state" / "uploads").iterdir())


def test_a_start_in_a_job_file(tmp_path: Path) -> None:
    def read(start: str) -> str:
        text = f'name = "next"\n[model]\nbase = "org/model"\n[lora]\nstart_from = "{start}"\n'
        (tmp_path / "job.toml").write_text(text)
        return job.read(tmp_path / "job.toml").lora.start_from

    (tmp_path / "round-1").mkdir()
    assert read("") == "" and read("round-1") == "round-1", "a name, whatever lies beside the job file"
    assert read("./round-1") == str(tmp_path / "round-1")
    assert read("/adapters/mine") == "/adapters/mine"
    for wrong in ("Round 1", "a\\\\b", "x" * 64):
        with pytest.raises(UsageError, match=r"lora\.start_from is .*; expected the name of an earlier job, or a path"):
            read(wrong)
