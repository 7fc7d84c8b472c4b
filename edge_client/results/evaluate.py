"""Did federation help here: the base, this machine's own adapter and the published model on the rows that this machine
held out. llama.cpp measures all three on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converters import adapter, architectures
from converters.families import NotKnownHere
from converters.gguf import adapter as gguf_adapter
from converters.gguf import base as gguf_base
from edge_client import outbox
from edge_client.data import files as data_files
from edge_client.data.tokenize import Example
from edge_client.outbox import DataSource, Outbox
from edge_client.results import llama_process
from edge_client.results.scores import MODELS, Nats, Scores
from edge_client.tasks import language_modelling
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround.errors import BadData, BadModel, Refused
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class OwnTraining:
    """What this machine has trained for a job, and on what."""

    box: Outbox
    job: pb.Job
    lease: str
    source: DataSource


def own_training(state: Path, name: str, data: Path | None = None) -> OwnTraining:
    """What this machine has trained for a job; `data` in the place of what it was trained on.

    Raises:
        Refused: this machine has not joined the job, or not trained for it.
        BadData: the data is not there any more.
    """
    box = outbox.find(state, name)
    joined = box.joined()
    assert joined is not None, "find looks at joined jobs"
    if box.trained() is None:
        raise Refused(f"this machine has not trained for {name!r} yet", hint="edge-client join --data FILE_OR_FOLDER")
    source = box.source() or DataSource("data")
    if data is not None:
        source = replace(source, data=str(data))
    data_files.require(Path(source.data), f"edge-client evaluate {name}")
    return OwnTraining(box, joined.job, joined.lease, source)


def compare(
    own: OwnTraining,
    base: Path,
    published: Path,
    screen: Screen,
    *,
    tokens: int,
    state: Path,
    base_gguf: Path | None = None,
) -> Scores:
    """Measure the base (a folder), this machine's adapter and the published model (a GGUF) on about so many held-out
    target tokens.

    Raises:
        BadData: nothing is held out.
        BadModel: the base cannot be made a GGUF, or llama.cpp does not take a file.
    """
    examples = held_out(own.source, base, own.job.spec.train.max_seq_len, tokens)
    whole = _base_gguf(own.job, base, state, base_gguf, screen)
    initial = own.box.initial if own.job.spec.lora.freeze_a else None
    adapter_gguf = own_adapter(own.box.adapter, base, whole, own.box.folder / "adapter.gguf", initial)
    files = {"base": (whole, None), "own": (whole, adapter_gguf), "published": (published, None)}
    count = sum(example.num_targets for example in examples)
    screen.say(events.Measuring(models=len(files), examples=len(examples), tokens=count))
    with screen.bar("measuring", len(files) * count) as advance:
        return measure(files, examples, lambda model, done: advance(done, model))


def event(scores: Scores, job: str, version: int, published: Path) -> events.Evaluated:
    """All that was measured, as it is reported."""
    losses = {model: scores.loss(model) for model in MODELS}
    base, own, merged = (events.ModelLoss(losses[model].per_token, losses[model].perplexity) for model in MODELS)
    return events.Evaluated(
        sentence=scores.sentence,
        helped=scores.helped,
        job=job,
        version=version,
        file=str(published),
        tokens=losses["base"].tokens,
        examples=len(scores.tokens),
        base=base,
        own=own,
        published=merged,
        published_minus=events.PublishedMinus(*(_difference(scores, other) for other in ("base", "own"))),
    )


def _difference(scores: Scores, other: str) -> events.LossDifference:
    difference = scores.difference("published", other)
    return events.LossDifference(difference.mean, difference.error if math.isfinite(difference.error) else None)


def _base_gguf(job: pb.Job, base: Path, state: Path, own: Path | None, screen: Screen) -> Path:
    """The base as a GGUF: the person's own, or one that is made once and kept."""
    built = outbox.base_gguf(state, job)
    if own is None and not built.exists():
        screen.say(events.BaseConverted(str(built)))
    return as_gguf(base, built, own)


def held_out(source: DataSource, base: Path, max_seq_len: int, most_tokens: int) -> list[Example]:
    """The rows that training holds out, tokenised as in training; the same ones whenever it is asked.

    Where they have more than `most_tokens` target tokens (0: no limit), whole examples drawn with a fixed seed.

    Raises:
        BadData: there is no such data, or nothing to measure on in it.
    """
    skip, spec = source.skip_bad_rows, pb.JobSpec(train=pb.TrainSpec(max_seq_len=max_seq_len))
    rows = language_modelling.load(Path(source.data), skip_bad_rows=skip).held_out
    examples = language_modelling.prepare(rows, base, spec, skip_bad_rows=skip).examples
    chosen = drawn([example.num_targets for example in examples], most_tokens)
    if not chosen:
        raise BadData(f"nothing is held out of {source.data} that could be measured on", hint="--data FILE_OR_FOLDER")
    return [examples[index] for index in chosen]


def drawn(tokens: Sequence[int], most: int) -> list[int]:
    """Which examples to take, in order, for about so many tokens in all; `most` = 0 takes all that have any."""
    candidates = [index for index, count in enumerate(tokens) if count]
    if not most or sum(tokens) <= most:
        return candidates
    indices, total = [], 0
    for index in np.random.default_rng(0).permutation(candidates).tolist():
        if total >= most:
            break
        indices.append(index)
        total += tokens[index]
    return sorted(indices)


def as_gguf(base: Path, built: Path, own: Path | None) -> Path:
    """The base as a GGUF: the given one, or one that is built from the base's folder, once.

    Raises:
        BadModel: it cannot be built, since the model's family is not known here.
    """
    if own is not None:
        return own
    if not built.exists():
        try:
            gguf_base.build(base, built)
        except NotKnownHere as error:
            raise BadModel(str(error), hint="--base-gguf FILE, with a GGUF of the base") from error
    return built


def own_adapter(trained: Path, base: Path, base_gguf: Path, to: Path, initial: Path | None = None) -> Path:
    """This machine's adapter as a GGUF adapter for the base. `initial` has its A, where that was frozen."""
    frozen = adapter.read(initial) if initial else None
    gguf_adapter.write(adapter.read(trained, frozen), to, architectures.describe(base, base_gguf))
    return to


def measure(
    files: Mapping[str, tuple[Path, Path | None]], examples: Sequence[Example], on_tokens: Callable[[str, int], None]
) -> Scores:
    """Have llama.cpp measure each of MODELS, a GGUF and perhaps an adapter, each in a process of its own.

    `on_tokens` is called with a model and how many target tokens of all models together are done.
    """
    tokens = np.array([example.num_targets for example in examples], np.int64)
    nats: dict[str, Nats] = {}
    for number, model in enumerate(MODELS):
        before = number * int(tokens.sum())

        def done(count: int, model: str = model, before: int = before) -> None:
            on_tokens(model, before + count)

        nats[model] = np.array(llama_process.losses(*files[model], examples, done))
    return Scores(nats, tokens)
