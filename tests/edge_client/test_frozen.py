"""A client's part in a job whose A is frozen: it sends B alone, and can still use what it trained."""

from pathlib import Path

import numpy as np

from converters import adapter, tensors
from converters.updates import sizes
from coordinator.jobs import spec as job
from edge_client import outbox
from tests.daemons import SPEC, running
from tests.fakes import FakeBackend
from tests.participants import participant, take_part


async def test_b_alone_is_sent_and_admitted(tmp_path: Path) -> None:
    who = participant(tmp_path, FakeBackend())
    spec = {**SPEC, "lora": {**SPEC["lora"], "freeze_a": True}, "upload": {"dtype": "bfloat16"}}  # type: ignore[dict-item]
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(job.parse(spec))
        receipt = await take_part(address, who)  # a quarantined contribution would raise
    box = outbox.find(who.state, "notes")
    found, header = tensors.read(box.adapter)
    joined = box.joined()
    assert joined is not None and header[adapter.FROZEN_A] == joined.job.initial.digest
    assert found and all(name.endswith("lora_B.weight") for name in found)
    expected = 2 * 2 * sum(module.out_features for module in joined.job.modules)  # rank 2, two bytes each
    assert sizes.sent_bytes(joined.job) == expected and expected < receipt.size <= sizes.finished_bytes(joined.job)

    initial = adapter.read(box.initial)
    for name, update in adapter.read(box.adapter, initial).modules.items():
        assert np.array_equal(update.a, initial.modules[name].a) and (update.b == 1).all()
