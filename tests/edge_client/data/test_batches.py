from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.data.batches import Batch, Batches
from edge_client.data.tokenize import Example, windows
from oneround.errors import BadData


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    """Examples whose ids are all different, so that each token can be found again."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=40))
    flags = [[False, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))] for n in lengths]
    flags[0] = [False, True]
    starts = np.cumsum([1, *(len(f) for f in flags)])
    return [
        Example(np.arange(start, start + len(f), dtype=np.int32), np.array(f))
        for start, f in zip(starts, flags, strict=False)
    ]


def learnt(batch: Batch) -> Counter[tuple[int, int]]:
    """(token before, target) pairs of a batch."""
    return Counter(zip(batch.inputs[batch.mask].tolist(), batch.labels[batch.mask].tolist(), strict=True))


@given(example_lists(), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_every_target_once_an_epoch_and_padding_never(examples: list[Example], batch_size: int, seed: int) -> None:
    plan = Batches(examples, batch_size, epochs=2, seed=seed)
    wanted = Counter(
        (int(e.ids[i - 1]), int(e.ids[i])) for e in examples for i in range(1, len(e.ids)) if e.is_target[i]
    )
    assert plan.num_targets == wanted.total()
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.batch(step) for step in steps]
        assert sum((learnt(batch) for batch in batches), Counter()) == wanted
        sizes = sorted(len(batch.inputs) for batch in batches)
        assert sizes[0] == (len(examples) % batch_size or batch_size)
        assert sizes[1:] == [batch_size] * (len(batches) - 1)
        for batch in batches:
            assert not (batch.mask & (batch.labels == 0)).any()  # 0 is padding here: no id is 0
            assert batch.targets.tolist() == np.flatnonzero(batch.mask.reshape(-1)).tolist()


@given(example_lists(), st.integers(9, 60), st.integers(0, 2**64 - 1))
def test_packing_fills_the_room_with_whole_examples(examples: list[Example], room: int, seed: int) -> None:
    plan = Batches(examples, 4, epochs=3, seed=seed, room=room)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.batch(step) for step in steps]
        assert sum(learnt(batch).total() for batch in batches) == plan.num_targets
        assert sum(len(batch.inputs) for batch in batches) == len(examples)
        sizes = sorted((batch.inputs.shape[1] + 1, len(batch.inputs)) for batch in batches)
        assert all(length * count <= room for length, count in sizes if count > 1)
        for (_, one), (length, next_one) in pairwise(sizes):
            assert (one + next_one) * length > room, "two neighbours would have gone into one step"


@given(example_lists(), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_parts_hold_every_target_once(examples: list[Example], batch_size: int, parts: int, seed: int) -> None:
    batch = Batches(examples, batch_size, 1, seed).batch(0)
    pieces = batch.split(parts)
    assert len(pieces) <= parts and sum((learnt(piece) for piece in pieces), Counter()) == learnt(batch)
    assert all(piece.mask[:, -1].any() for piece in pieces), "no longer than its last target"


@given(example_lists(), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_the_same_batch_in_any_order_of_asking(examples: list[Example], batch_size: int, seed: int) -> None:
    first, second = (Batches(examples, batch_size, epochs=3, seed=seed) for _ in range(2))
    forwards = [first.batch(step) for step in range(first.total_steps)]
    backwards = [second.batch(step) for step in reversed(range(second.total_steps))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert np.array_equal(one.inputs, other.inputs)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.mask, other.mask)


def test_seeds_and_epochs_differ_and_lengths_keep_company() -> None:
    rng = np.random.default_rng(0)
    examples = [pair for n in rng.integers(2, 200, 640) for pair in windows(range(1, int(n) + 1), 512)]
    plan = Batches(examples, 8, 2, 0)
    first, again = ([plan.batch(step).inputs.shape[1] for step in range(e * 80, e * 80 + 80)] for e in range(2))
    other = [Batches(examples, 8, 2, 1).batch(step).inputs.shape[1] for step in range(80)]
    assert first != again and first != other
    area = sum(plan.batch(step).inputs.size for step in range(80))
    assert plan.num_targets > 0.95 * area
    assert first != sorted(first)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2.5, 10), (0.25, 1), (0.001, 1), (3, 12)])
def test_epochs_may_be_fractional(epochs: float, steps: int) -> None:
    examples = windows(range(1, 17), 2)  # 15 examples
    plan = Batches(examples, 4, epochs, 0)
    assert plan.steps_per_epoch == 4
    assert plan.total_steps == steps


def test_nothing_to_learn_is_bad_data() -> None:
    for examples in ([], [Example(np.array([1, 2], np.int32), np.array([False, False]))]):
        with pytest.raises(BadData, match="no example"):
            Batches(examples, 8, 1, 0)
