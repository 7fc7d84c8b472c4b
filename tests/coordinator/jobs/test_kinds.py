"""A job file has the table of one kind of update; where it has none, that of the default."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from converters.updates import kinds
from coordinator.jobs import spec as jobs
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb

MINIMAL = 'name = "notes"\n[model]\nbase = "org/model"\n'


def read(tmp_path: Path, text: str) -> pb.JobSpec:
    file = tmp_path / "job.toml"
    file.write_text(text)
    return jobs.read(file)


def of_two_kinds() -> Message:
    """A message like JobSpec, when there will be two."""
    file = descriptor_pb2.FileDescriptorProto(name="two.proto", package="two", syntax="proto3")
    table = file.message_type.add(name="Table")
    table.field.add(name="rank", number=1, type="TYPE_UINT32", label="LABEL_OPTIONAL")
    job = file.message_type.add(name="Job")
    job.oneof_decl.add(name="update")
    for number, name in enumerate(("lora", "dense"), 1):
        job.field.add(
            name=name, number=number, type="TYPE_MESSAGE", label="LABEL_OPTIONAL", type_name=".two.Table", oneof_index=0
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("two.Job"))()


@pytest.mark.parametrize("text", [MINIMAL, f"{MINIMAL}[lora]\n", f"{MINIMAL}[lora]\nrank = 16\n"])
def test_without_a_table_it_is_the_default_kinds(tmp_path: Path, text: str) -> None:
    spec = read(tmp_path, text)
    assert spec.WhichOneof("update") == kinds.DEFAULT == "lora"
    assert spec.lora.rank == 16 and spec.lora.HasField("rank") and list(spec.lora.target_modules) == ["all-linear"]
    assert spec == read(tmp_path, MINIMAL)


def test_two_tables_are_one_too_many() -> None:
    job = of_two_kinds()
    jobs._take({"dense": {"rank": 3}}, job, "")
    assert job.WhichOneof("update") == "dense" and job.dense.rank == 3  # type: ignore[attr-defined]
    jobs._take({"dense": {}}, job, "")
    with pytest.raises(UsageError, match=r"a job has one of \[dense\] and \[lora\], not both"):
        jobs._take({"lora": {}}, job, "")
    assert job.WhichOneof("update") == "dense", "and the other is not lost"


def test_an_empty_table_says_which_kind_it_is() -> None:
    job = of_two_kinds()
    jobs._take({"dense": {}}, job, "")
    assert job.WhichOneof("update") == "dense"


def test_where_to_start_from_is_relative_to_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, f'{MINIMAL}[lora]\nstart_from = "./x"\n').lora.start_from == str((tmp_path / "x").resolve())
    assert read(tmp_path, f'{MINIMAL}[lora]\nstart_from = "earlier"\n').lora.start_from == "earlier"
