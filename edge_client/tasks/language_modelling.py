"""Language modelling: texts and conversations → token ids, of which some are targets → next-token loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from converters import checkpoint
from edge_client.backends import MemoryFigures
from edge_client.data import rows as row_files
from edge_client.data import tokenize
from edge_client.data.batches import Batches
from edge_client.data.rows import Row, Rows
from edge_client.data.tokenize import Example, Tokenised
from edge_client.preflight import memory
from edge_client.training.recipe import Setup
from oneround.errors import BadModel
from oneround.v1 import federation_pb2 as pb


def load(path: Path, *, skip_bad_rows: bool = False) -> Rows:
    return row_files.load(path, skip_bad_rows=skip_bad_rows)


def prepare(rows: Iterable[Row], base: Path, spec: pb.JobSpec, *, skip_bad_rows: bool = False) -> Tokenised:
    tokenizer = tokenize.load_tokenizer(base)
    return tokenize.tokenise(rows, tokenizer, spec.train.max_seq_len, skip_bad_rows=skip_bad_rows)


def batches(examples: Sequence[Example], spec: pb.JobSpec) -> Batches:
    train = spec.train
    room = train.batch_size * train.max_seq_len if train.packing else 0
    return Batches(examples, train.batch_size, train.epochs, train.seed, room=room)


def memory_needed(
    base: Path, job: pb.Job, figures: MemoryFigures, longest: int | None = None
) -> Callable[[Setup], int] | None:
    try:
        config = checkpoint.config(base)
        if any(base.glob("*.safetensors")):
            parameters = memory.parameters(base)
        else:
            parameters = memory.parameters_announced(job.base_files, config)
        shape = memory.model(config, parameters)
    except BadModel:
        return None
    return lambda setup: memory.memory_needed(shape, job, figures, longest=longest, setup=setup)
