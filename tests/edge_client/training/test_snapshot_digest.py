"""A snapshot that an earlier version kept is still one of the same run."""

from edge_client.data.batches import Batches
from edge_client.training import snapshot
from edge_client.training.recipe import Recipe
from oneround.v1 import federation_pb2 as pb
from tests.edge_client import tiny

BEFORE = "4261e8bbfc84800a746061edcb0f0d7a3aa5454167d30fbca6f3e20c7d867bf3"  # by version 0.1.0


def test_the_digest_of_a_run_is_what_it_was() -> None:
    plan = Batches(tiny.examples(24), batch_size=8, epochs=2, seed=3)
    train = pb.TrainSpec(learning_rate=3e-3, schedule="cosine", warmup_ratio=0.1)
    recipe = Recipe.from_spec(pb.JobSpec(lora=pb.LoraSpec(dropout=0.2), train=train), plan.total_steps)
    assert snapshot.run_digest("torch", "ab" * 32, recipe, plan, "x") == BEFORE
