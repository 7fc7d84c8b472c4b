"""Doctor looks at what join would do: the same steps, and the same refusal."""

import json
import shutil
from pathlib import Path

import pytest

from coordinator.jobs import spec
from edge_client import backends, session
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.connection.target import Target
from edge_client.doctor import run as doctor
from edge_client.doctor.finding import Case, Finding
from edge_client.session.prepare import load_rows, prepare
from edge_client.ui.screen import Screen
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb
from tests.daemons import BASE, SPEC, running
from tests.fakes import FakeBackend
from tests.participants import participant, take_part

usable = [name for name in backends.BACKENDS if backends.load(name).available() is None]


class Picky(FakeBackend):
    """Cannot train what it is asked to."""

    def incompatible(self, base: Path, plan: object) -> str:
        return "it computes something else"


async def examined(case: Case) -> dict[str, Finding]:
    return {finding.check: finding async for finding in doctor.examine(case, Screen())}


@pytest.mark.skipif(not usable, reason="no training framework is here")
async def test_doctors_steps_are_those_that_join_takes_when_packing(tmp_path: Path) -> None:
    """Rows of a few tokens leave most of 2 × 512 empty: without packing there are ten times as many steps."""

    who = participant(tmp_path, backend := FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse({**SPEC, "train": {"batch_size": 2, "packing": True}}))
        case = Case(tmp_path / "doctor", target=Target(address), data=who.data)
        findings = await examined(case)
        assert (await take_part(address, who)).digest
    assert case.prepared is not None and case.prepared.plan.total_steps == backend.steps
    assert f" {backend.steps} steps" in findings["data"].says
    assert findings["compatibility"].level == "ok"


@pytest.mark.skipif("mlx" not in usable, reason="needs mlx")
async def test_doctor_refuses_as_join_does_what_mlx_computes_otherwise(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = json.loads((base / "config.json").read_text())
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 2}
    (base / "config.json").write_text(json.dumps({**config, **changes}))

    who = participant(tmp_path, FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse({**SPEC, "model": {"base": str(base)}}))
        case = Case(tmp_path / "doctor", target=Target(address), data=who.data, backend_name="mlx")
        finding = (await examined(case))["compatibility"]
        who = session.Participant(who.state, "alice", who.data, backends.load("mlx"))
        with pytest.raises(UsageError) as caught:
            async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
                await session.take_part(remote, "notes", who, Screen())
    assert (finding.level, finding.exit_code) == ("problem", caught.value.exit_code)
    assert (finding.says, finding.hint) == (str(caught.value), caught.value.hint)
    assert "no sliding window for mistral" in finding.says and "--backend torch" in finding.hint


def test_what_cannot_be_trained_is_still_counted(tmp_path: Path) -> None:
    who = participant(tmp_path, Picky())
    rows = load_rows(who.data, pb.JobSpec(), skip_bad_rows=False)
    prepared = prepare(rows, BASE, pb.JobSpec(), who.backend, skip_bad_rows=False)
    assert prepared.plan.num_examples == len(rows.train) and prepared.held_out == len(rows.held_out)
    with pytest.raises(UsageError, match="it computes something else") as caught:
        prepared.require_compatible()
    assert all(f"--backend {name}" in caught.value.hint for name in backends.BACKENDS)


def test_what_can_be_trained_is_no_error(tmp_path: Path) -> None:
    who = participant(tmp_path, FakeBackend())
    rows = load_rows(who.data, pb.JobSpec(), skip_bad_rows=False)
    prepare(rows, BASE, pb.JobSpec(), who.backend, skip_bad_rows=False).require_compatible()
