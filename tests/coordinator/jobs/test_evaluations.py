"""What clients report of a publication: kept, replaced, put together, shown to the operator and to nobody else."""

import asyncio
import io
import json
from pathlib import Path

import pytest
from google.protobuf import json_format
from rich.console import Console

from coordinator.cli import tables
from coordinator.jobs import evaluations
from oneround.errors import Refused
from oneround.v1 import federation_pb2 as pb
from tests.daemons import ALICE, BOB, join, served, two_contribute, version


def said(base: float, own: float, published: float, version: int = 1) -> pb.Evaluation:
    return pb.Evaluation(version=version, base_loss=base, own_loss=own, published_loss=published, tokens=500)


def test_the_mean_counts_every_client_once() -> None:
    clients = [
        pb.ClientStatus(name="a", evaluations=[said(3.0, 2.0, 2.5), said(3.0, 2.0, 1.75, version=2)]),
        pb.ClientStatus(name="b", evaluations=[said(4.0, 3.0, 2.75)]),
        pb.ClientStatus(name="c", evaluations=[said(2.0, 2.5, 2.0)]),  # as good as the base is not better
        pb.ClientStatus(name="d"),
    ]
    first, second = evaluations.compare(clients)
    assert (first.version, first.clients, first.better_than_base, first.better_than_own) == (1, 3, 2, 2)
    assert (first.base_loss, first.own_loss) == (3.0, 2.5) and first.published_loss == pytest.approx(7.25 / 3)
    assert (second.version, second.clients, second.better_than_base, second.better_than_own) == (2, 1, 1, 1)
    assert evaluations.compare([]) == []


async def test_reports_are_kept_and_shown_to_the_operator(tmp_path: Path) -> None:
    state = tmp_path / "state"

    async with served(state) as (daemon, remote):
        await two_contribute(remote, tmp_path)
        leases = {client: (await join(remote, client)).lease for client in (ALICE, BOB)}
        with pytest.raises(Refused, match="has no version 1"):
            await remote.report(leases[ALICE], said(3.0, 2.5, 2.4))
        await daemon.operator.close("notes")
        await version(daemon, 1, "notes")
        await remote.report(leases[ALICE], said(3.0, 2.5, 9.0))
        await remote.report(leases[ALICE], said(3.0, 2.5, 2.4))  # the last word holds
        await remote.report(leases[BOB], said(3.5, 2.0, 2.6))
        with pytest.raises(Refused, match="lease is not known"):
            await remote.report("0" * 64, said(3.0, 2.5, 2.4))
    async with served(state) as (daemon, remote):
        status = await daemon.operator.status("notes")
        (whole,) = status.comparisons
        assert (whole.clients, whole.better_than_base, whole.better_than_own) == (2, 2, 1)
        paper = io.StringIO()
        Console(file=paper, width=200).print(tables.job(status))
        shown = paper.getvalue()
        assert "aaaaa" in shown and "-0.600" in shown and "-0.100" in shown and "+0.600" in shown
        assert "better than the base for 2 of 2, and better than what they trained alone for 1 of 2" in shown
        told = json.loads(json_format.MessageToJson(status, preserving_proto_field_name=True))
        assert told["comparisons"][0]["published_loss"] == 2.5
        assert [len(client["evaluations"]) for client in told["clients"]] == [1, 1]

        public = await remote.job("notes")
        assert not public.comparisons and not public.clients
        await daemon.operator.delete("notes")
        assert await asyncio.to_thread(daemon._store.evaluations, "notes") == {}
