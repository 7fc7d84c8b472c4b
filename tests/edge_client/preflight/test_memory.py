"""The estimate of what training takes: what it follows from, and that it is not below what a real training took."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from converters import architectures, checkpoint
from converters.settings import Settings
from converters.updates import sizes
from edge_client import backends
from edge_client.backends import MemoryFigures
from edge_client.preflight import memory
from edge_client.session.prepare import estimate_memory
from edge_client.training.recipe import EXACT, Setup
from oneround.errors import BadModel
from oneround.v1 import federation_pb2 as pb
from tests.fakes import FakeBackend

FIGURES = MemoryFigures(overhead=1.75, logits_at_once=1 << 22)
BASE = Path(__file__).parents[3] / "benchmarks" / "base"


def job_over(base: Path, **train: int) -> pb.Job:
    linears = architectures.describe(base).linears
    modules = [pb.Module(name=n, out_features=s.out, in_features=s.into) for n, s in linears.items()]
    files = [pb.Artifact(name=f.name, size=f.stat().st_size) for f in architectures.model_files(base)]
    return pb.Job(spec=pb.JobSpec(train=pb.TrainSpec(**train)), modules=modules, base_files=files)


def needed(job: pb.Job, **options: object) -> int:
    base = memory.model(checkpoint.config(BASE), memory.parameters(BASE))
    options = {"figures": FIGURES, **options}
    return memory.memory_needed(base, job, **options)  # type: ignore[arg-type]


def test_it_grows_with_what_it_follows_from() -> None:
    job = job_over(BASE, batch_size=8, max_seq_len=512)
    whole = needed(job)
    assert needed(job, longest=512) == needed(job, longest=9999) == whole, "what is longer is cut"
    assert needed(job, longest=64) < whole and needed(job, setup=Setup("bfloat16")) < 0.6 * whole
    assert whole < needed(job, figures=replace(FIGURES, keeps_attention=True)) < needed(job, figures=MemoryFigures(9.0))
    ladder = [setup := EXACT]
    while (smaller := setup.smaller(8)) is not None:
        ladder.append(setup := smaller)
    costs = [needed(job, setup=setup) for setup in ladder]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(ladder) == 5
    assert needed(job, setup=Setup(bits=4)) < needed(job, setup=Setup(bits=8)) < whole
    assert needed(job_over(BASE, batch_size=16, max_seq_len=512)) > 1.5 * whole
    with_dropout = pb.Job()
    with_dropout.CopyFrom(job)
    with_dropout.spec.lora.dropout = 0.1
    assert needed(with_dropout) > whole
    assert needed(job, longest=2) > 4 * memory.parameters(BASE) + 28 * sizes.elements(job)


def test_parameters_are_counted_or_inferred() -> None:
    job, config = job_over(BASE), checkpoint.config(BASE)
    counted = memory.parameters(BASE)
    assert counted == sum(tensor.size for tensor in checkpoint.weights(BASE).values()) > 4_000_000
    assert memory.parameters_announced(job.base_files, config) == pytest.approx(counted, rel=0.01)
    single = Settings({**config.values, "torch_dtype": "float32"}, "config", BadModel)
    assert memory.parameters_announced(job.base_files, single) == pytest.approx(counted / 2, rel=0.01)


def test_a_model_whose_config_says_something_else_has_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 768, "n_layer": 12}))
    assert estimate_memory(tmp_path, job_over(BASE), FakeBackend(), None, EXACT) is None


def test_what_is_short_is_said() -> None:
    seen = estimate_memory(BASE, job_over(BASE), FakeBackend(), 64, EXACT)
    assert seen is not None and seen.available and not seen.short
    assert replace(seen, available=seen.needed - 1).short
    assert not replace(seen, available=None).short, "a device of its own has memory that is not known here"


TRAIN = """
import re, sys
from pathlib import Path
import numpy as np
from converters import adapter, architectures
from edge_client import backends
from edge_client.data.batches import Batches
from edge_client.data.tokenize import Example
from edge_client.training.recipe import Recipe
from oneround.v1 import federation_pb2 as pb
base, backend = Path(sys.argv[1]), backends.load("torch")
described = architectures.describe(base)
initial = adapter.initial(architectures.adapted(described, "all-linear"), 16, 0)
for count, length in ((1, 16), (8, 256)):
    ids = np.random.default_rng(0).integers(0, described.vocab_size, (2 * count, length)).astype(np.int32)
    plan = Batches([Example(row, np.arange(length) > 0) for row in ids], count, 1, 0)
    recipe = Recipe.from_spec(pb.JobSpec(), plan.total_steps)
    backend.train(base, initial, recipe, plan, lambda progress: progress.arrays() and None)
    # Not getrusage: Linux hands its maximum on to a child, and ours is the test runner's.
    print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.skipif(backends.load("torch").available() is not None, reason="PyTorch is not here")
def test_it_is_near_what_a_training_took() -> None:
    # What a larger batch takes over a small one: what a library takes once, or maps, differs from machine to machine.
    printed = subprocess.run(
        [sys.executable, "-c", TRAIN, str(BASE)], check=True, capture_output=True, text=True
    ).stdout
    small, large = map(int, printed.split())
    took = large - small
    figures = backends.load("torch").memory_figures()
    expected = needed(job_over(BASE, batch_size=8, max_seq_len=256), figures=figures) - needed(
        job_over(BASE, batch_size=1, max_seq_len=16), figures=figures
    )
    assert 0.6 * took < expected < 3 * took, (took, expected)
