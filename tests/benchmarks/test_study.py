"""benchmarks/study: its cohort trainer is the product's training, its server steps are their papers', and nothing is
dealt twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study import presets, report, rounds
from study.cells import CENTRALISED, FROZEN, ONE_SHOT, Cell, Ledger
from study.llama import Llama
from study.results import Results
from study.rounds import ALGORITHMS, Algorithm, Plan, Server, run
from study.tasks import TASKS, deal
from study.training import Space, dense, evaluate, gradient, train
from transformers import LlamaConfig, LlamaForCausalLM

from converters.adapter import Adapter
from coordinator.aggregate import ClientUpdate, aggregate
from edge_client.backends import load
from edge_client.data.batches import padded
from edge_client.data.tokenize import Example
from edge_client.training.recipe import Recipe

RANK, SCALING = 4, 2.0
PLAN = Plan(epochs=2, batch_size=3, seed=5)
RECIPE = Recipe(
    alpha=SCALING * RANK,
    dropout=0.0,
    peak_learning_rate=5e-3,
    schedule="linear",
    warmup_steps=0,
    total_steps=1,
    seed=5,
)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with grouped queries; nothing of it is square."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=request.param == "tied",
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp(request.param)
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.setdefault("rope_theta", settings.get("rope_parameters", {}).get("rope_theta", 10000.0))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def examples(count: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(4, 12, count):
        ids = rng.integers(0, 60, length).astype(np.int32)
        found.append(Example(ids, (np.arange(length) > 0) & (rng.random(length) < 0.8)))
    return found


def space(llama: Llama) -> Space:
    return Space(llama.shapes, RANK, SCALING)


def largest(a: Adapter, b: Adapter) -> float:
    pairs = [(a.modules[name].delta(), b.modules[name].delta()) for name in a.modules]
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def test_loss_is_that_of_transformers(folder: Path) -> None:
    """Also where B is not zero, merged or beside the base."""
    llama, some = Llama.load(folder), examples(7, 0)
    where = space(llama)
    vector = where.initial(0) + 0.05
    adapter = where.adapter(vector)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, delta in dense(adapter).items():
            model.get_submodule(name).weight += delta
        batch = padded(some)
        logits = model(torch.from_numpy(batch.inputs).long()).logits.reshape(-1, 60)
        wanted = torch.nn.functional.cross_entropy(
            logits[torch.from_numpy(batch.targets)], torch.from_numpy(batch.targeted).long()
        )
        factors = {n: (a, SCALING * b) for n, (a, b) in where.factors(vector[None]).items()}
        hidden = llama.hidden(torch.from_numpy(batch.inputs)[None].long(), factors)
        beside, _ = llama.losses(
            hidden.flatten(0, 2)[torch.from_numpy(batch.targets)], torch.from_numpy(batch.targeted).long()
        )
    assert evaluate(llama.merged(dense(adapter)), some) == pytest.approx(float(wanted), abs=2e-6)
    assert float(beside.mean()) == pytest.approx(float(wanted), abs=2e-6)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_cohort_at_once_trains_as_each_client_would(folder: Path, freeze_a: bool) -> None:
    """Clients of several sizes, so of several numbers of steps, against the product's backend, one after the other."""
    llama = Llama.load(folder)
    where, recipe = space(llama), replace(RECIPE, freeze_a=freeze_a)
    start = where.initial(3)
    plans = [PLAN.batches(examples(count, count), 0) for count in (4, 11, 7)]
    recipes = [PLAN.recipe(recipe, plan.total_steps, 0) for plan in plans]
    found = train(llama, where, start, plans, recipes).vectors
    assert len({plan.total_steps for plan in plans}) == 3
    for vector, plan, mine in zip(found, plans, recipes, strict=True):
        wanted = load("torch").train(folder, where.adapter(start), mine, plan, lambda _: None)
        moved = largest(wanted, where.adapter(start))
        assert moved > 1e-2
        assert largest(wanted, where.adapter(vector)) < 1e-3 * moved


def test_in_parts_as_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cohort too large for one pass is taken in parts, and comes out the same."""
    llama = Llama.load(folder)
    plans = [PLAN.batches(examples(5, seed), 0) for seed in range(4)]
    recipes = [PLAN.recipe(RECIPE, plan.total_steps, 0) for plan in plans]
    at_once = train(llama, space(llama), space(llama).initial(0), plans, recipes)
    monkeypatch.setattr("study.training.TOKENS_AT_ONCE", 40)
    parts = train(llama, space(llama), space(llama).initial(0), plans, recipes)
    torch.testing.assert_close(parts.vectors, at_once.vectors, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("algorithm", "method"), [("fedavg", "fedavg"), ("fedavg of ΔW, svd", "svd")])
def test_rounds_are_a_chain_of_jobs(folder: Path, algorithm: str, method: str) -> None:
    """Two rounds, against the product's backend and its aggregation."""
    llama, clients = Llama.load(folder), [examples(6, 1), examples(9, 2)]
    where, plan = space(llama), replace(PLAN, rounds=2)
    found = run(llama, where, where.initial(0), clients, plan, RECIPE, ALGORITHMS[algorithm])
    current = where.adapter(where.initial(0))
    for round_ in range(2):
        sent = []
        for mine in clients:
            batches = plan.batches(mine, round_)
            recipe = plan.recipe(RECIPE, batches.total_steps, round_)
            sent.append(ClientUpdate(load("torch").train(folder, current, recipe, batches, lambda _: None), len(mine)))
        current = aggregate(sent, method, rank=RANK if method == "svd" else 0).adapter
    assert largest(current, where.adapter(found)) < 1e-4


def test_what_clients_are_asked_to_do_besides(folder: Path) -> None:
    """A strong pull keeps them where they began; among equal clients there is nothing to correct."""
    llama = Llama.load(folder)
    where, plan = space(llama), replace(PLAN, rounds=2)
    start = where.initial(0)

    def after(clients: list[list[Example]], algorithm: Algorithm) -> torch.Tensor:
        return run(llama, where, start, clients, plan, RECIPE, algorithm)

    equal, unequal = [examples(6, 1)] * 2, [examples(6, 1), examples(6, 2)]
    free = after(unequal, ALGORITHMS["fedavg"])
    held = after(unequal, Algorithm(rounds.fedavg, proximal=1e4))
    assert float((held - start).norm()) < 0.7 * float((free - start).norm())
    torch.testing.assert_close(after(equal, ALGORITHMS["scaffold"]), after(equal, ALGORITHMS["fedavg"]))
    assert not torch.allclose(after(unequal, ALGORITHMS["scaffold"]), free)


def test_server_steps() -> None:
    """Two steps of each, worked out by hand for a change of 2 and then 1, at a server learning rate of 0.5."""
    wanted = {
        "fedavg": (1.0, 0.5),
        "fedavgm": (1.0, 0.5 * (0.9 * 2 + 1)),
        "diloco": (0.5 * (2 + 0.9 * 2), 0.5 * (1 + 0.9 * (0.9 * 2 + 1))),
        "fedadam": (0.5 * 0.2 / (0.04**0.5 + 1e-3), 0.5 * 0.28 / ((0.04 * 0.99 + 0.01) ** 0.5 + 1e-3)),
        "fedyogi": (0.5 * 0.2 / (0.04**0.5 + 1e-3), 0.5 * 0.28 / (0.05**0.5 + 1e-3)),
    }
    for name, steps in wanted.items():
        server = Server(torch.zeros(1), torch.zeros(1))
        for change, step in zip((2.0, 1.0), steps, strict=True):
            assert float(ALGORITHMS[name].step(server, torch.tensor([change]), 0.5)) == pytest.approx(step), name


def test_a_continued_schedule_is_one_schedule() -> None:
    one = PLAN.recipe(RECIPE, 12, 0)
    parts = [replace(PLAN, rounds=3, continued=True).recipe(RECIPE, 4, round_) for round_ in range(3)]
    assert [part.learning_rate(step) for part in parts for step in range(4)] == [
        one.learning_rate(step) for step in range(12)
    ]


def test_gradient_by_differences(folder: Path) -> None:
    llama, some = Llama.load(folder), examples(6, 4)
    names = sorted(llama.shapes)
    found = gradient(llama, names, some)
    direction = {name: 1e-3 * torch.sign(torch.randn(*llama.shapes[name])) for name in names}
    flat = torch.cat([direction[name].reshape(-1) for name in names]).numpy()
    ahead, behind = (
        evaluate(llama.merged({name: sign * delta for name, delta in direction.items()}), some) for sign in (1, -1)
    )
    assert float(found @ flat) == pytest.approx((ahead - behind) / 2, rel=2e-2, abs=2e-5)


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    clients=st.integers(1, 12),
    dealt=st.sampled_from(["random", "groups", 0.1, 1.0, float("inf")]),
    seed=st.integers(0, 100),
)
def test_everything_is_dealt_once_and_evenly(counts: list[int], clients: int, dealt: str | float, seed: int) -> None:
    one = Example(np.zeros(2, np.int32), np.array([False, True]))
    stock = {str(label): [replace(one) for _ in range(count)] for label, count in enumerate(counts)}
    hands = deal(stock, clients, dealt, np.random.default_rng(seed))
    assert sorted(id(e) for hand in hands for e in hand) == sorted(id(e) for found in stock.values() for e in found)
    if isinstance(dealt, str) or dealt == float("inf"):
        assert max(map(len, hands)) - min(map(len, hands)) <= 1
    elif sum(counts) >= clients:
        assert all(hands)


def test_dirichlet_goes_from_one_label_each_to_all_alike() -> None:
    one = Example(np.zeros(2, np.int32), np.array([False, True]))
    stock = {label: [replace(one) for _ in range(100)] for label in "abcde"}
    label_of = {id(e): label for label, found in stock.items() for e in found}

    def largest_share(alpha: float) -> float:
        """Of a label in a client's examples, over all clients."""
        hands = deal(stock, 10, alpha, np.random.default_rng(0))
        counts = [[sum(label_of[id(e)] == label for e in hand) for label in stock] for hand in hands]
        return float(np.mean([max(one) / sum(one) for one in counts]))

    assert largest_share(0.1) > 0.7 > largest_share(1.0) > 0.36 > largest_share(1000.0)


def test_a_ledger_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    cells = [Cell("b", "t", "fedavg", seed) for seed in range(3)]
    ledger = Ledger(tmp_path / "cells.jsonl")
    for cell in cells[:2]:
        ledger.add(cell, {"losses": {"multi-round": {"test": 1.0 + cell.seed, "valid": 1.0}}}, 0.1)
    whole = ledger.file.read_bytes()
    ledger.file.write_bytes(whole[:-20])
    again = Ledger(tmp_path / "cells.jsonl")
    assert again.missing([*cells, *cells]) == cells[1:]
    again.add(cells[1], {"losses": {"multi-round": {"test": 2.0, "valid": 1.0}}}, 0.1)
    found = Results(Ledger(tmp_path / "cells.jsonl").found)
    assert found.losses(cells[0]) == {0: 1.0, 1: 2.0}
    spread = found.loss(cells[0])
    assert spread == (1.5, pytest.approx(0.5**0.5), 2)


def test_a_stated_figure_has_three_seeds() -> None:
    cells = {cell.name: cell for cell in presets.paper()}.values()
    seeds: dict[Cell, set[int]] = {}
    for cell in cells:
        seeds.setdefault(replace(cell, seed=0), set()).add(cell.seed)
    assert all(len(found) >= 3 for found in seeds.values())
    assert {cell.algorithm for cell in cells} == {ONE_SHOT, FROZEN, CENTRALISED, *ALGORITHMS}


def test_a_setting_that_is_the_tasks_own_has_one_name() -> None:
    """Or it would be measured twice."""
    cell = Cell("0.3M", presets.SPEAKERS, ONE_SHOT)
    assert presets.times(cell, 1.0, 1.0) == cell
    twice = presets.times(cell, 1.0, 2.0)
    assert twice.epochs == 2 * TASKS[cell.task].epochs and twice.name != cell.name


def test_report_says_what_was_measured(tmp_path: Path) -> None:
    """Shares seed by seed, mean and spread; what is missing is left out, and so are its columns."""
    ledger = Ledger(tmp_path / "cells.jsonl")
    one = Cell("0.3M", presets.SPEAKERS, ONE_SHOT)

    def loss(value: float) -> dict[str, float]:
        return {"test": value, "valid": value}

    for seed, mean in enumerate((3.0, 3.2)):
        local = [loss(3.5)] * 9 + [loss(2.9)]
        found = {"losses": {"base": loss(4.0), "exact": loss(mean)}, "local": local, "arrivals": [[3.6, mean]]}
        ledger.add(replace(one, seed=seed), found, 1.0)
        pooled = {"losses": {"base": loss(4.0), "centralised": loss(2.0)}}
        ledger.add(replace(one, seed=seed, algorithm=CENTRALISED), pooled, 1.0)
    machine = {"cpu": "a", "cores": 1, "python": "3", "versions": {}, "when": "today"}
    document = report.write(tmp_path, ledger, list(presets.paper()), "paper", machine)
    shares = document["shares"][f"0.3M: {presets.SPEAKERS}"]
    assert shares["one-shot exact"] == {"share": 0.45, "sd": pytest.approx(0.0707, abs=1e-4), "seeds": 2}
    assert shares["best local"]["share"] == 0.55
    text = (tmp_path / "report.md").read_text()
    assert "| 0.3M: shakespeare, by speaker | 28 ± 0 % (2) | 55 ± 0 % (2) | 45 ± 7 % (2) |" in text
    assert "4 of " in text and "T = 10 |" not in text.split("## Shares")[1].split("##")[0]
    assert (tmp_path / "arrivals.png").stat().st_size > 1000 and not (tmp_path / "bound.png").exists()
