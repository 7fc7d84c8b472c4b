"""Job files: what is filled in, and what is refused, by name."""

from pathlib import Path

import pytest

from coordinator.jobs import spec as job
from oneround.errors import UsageError

MINIMAL = 'name = "notes"\n[model]\nbase = "org/model"\n'


def read(tmp_path: Path, text: str):  # type: ignore[no-untyped-def]
    file = tmp_path / "job.toml"
    file.write_text(text)
    return job.read(file)


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    spec = read(tmp_path, MINIMAL)
    assert (spec.lora.rank, spec.lora.alpha, list(spec.lora.target_modules)) == (16, 32, ["all-linear"])
    assert (spec.train.epochs, spec.train.schedule, spec.train.batch_size) == (3, "linear", 8)
    assert (spec.round.min_clients, spec.round.target_clients, spec.round.deadline) == (2, 10, "24h")
    assert (spec.upload.dtype, spec.aggregate.method, list(spec.publish.gguf)) == ("bfloat16", "exact", ["f16", "q8_0"])
    assert spec.lora.HasField("rank"), "written out, so that a stored job keeps its meaning"


def test_the_designs_own_example_is_a_job(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        """
        name = "clinic-notes"
        [model]
        base = "HuggingFaceTB/SmolLM2-135M"
        revision = "main"
        gguf = ""
        [lora]
        rank = 16
        alpha = 32
        dropout = 0.0
        target_modules = "all-linear"
        [train]
        epochs = 3
        learning_rate = 3e-4
        schedule = "linear"
        warmup_ratio = 0.0
        batch_size = 8
        max_seq_len = 512
        seed = 0
        [round]
        min_clients = 2
        target_clients = 10
        deadline = "24h"
        [upload]
        dtype = "bfloat16"
        [aggregate]
        method = "exact"
        server_learning_rate = 1.0
        [publish]
        gguf = ["f16", "q8_0"]
        adapter_rank = 0
        """,
    )
    assert spec.train.learning_rate == 3e-4


def test_a_base_beside_the_file_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    spec = read(tmp_path, 'name = "notes"\n[model]\nbase = "base"\n')
    assert spec.model.base == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "[train]\nlearning_rat = 1e-3\n", "`train.learning_rat`; did you mean `train.learning_rate`"),
        (MINIMAL + "[trian]\nepochs = 1\n", "unknown key `trian`; did you mean `train`"),
        (MINIMAL + "[train]\nlearningRate = 1e-3\n", "unknown key `train.learningRate`"),
        (MINIMAL + "[train]\nepochs = 'many'\n", "train.epochs is 'many'; expected a number"),
        (MINIMAL + "[train]\nepochs = -1\n", "train.epochs is -1.0; expected more than 0"),
        (MINIMAL + "[train]\nepochs = nan\n", "train.epochs"),
        (MINIMAL + "[train]\nbatch_size = -1\n", "train.batch_size is -1; expected a whole number"),
        (MINIMAL + "[train]\nschedule = 'wavy'\n", "expected constant, linear, cosine"),
        (MINIMAL + "[round]\ndeadline = 'tomorrow'\n", "round.deadline is 'tomorrow'"),
        (MINIMAL + "[round]\nmin_clients = 5\ntarget_clients = 4\n", "round.target_clients"),
        (MINIMAL + "[upload]\ndtype = 'int8'\n", "expected float32, bfloat16, float16"),
        (MINIMAL + "[aggregate]\nmethod = 'median of means'\n", "expected exact, fedavg"),
        (MINIMAL + "[publish]\ngguf = ['q2']\n", "publish.gguf"),
        ("name = 'notes'\nmodel = 'org/model'\n", "`model` is a table"),
        ("name = 'notes'\n", "model.base"),
        ("name = '../../etc'\n[model]\nbase = 'org/model'\n", "name is '../../etc'"),
        ("name = \n", "is not TOML"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert says in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the job file"):
        job.read(tmp_path / "none.toml")
