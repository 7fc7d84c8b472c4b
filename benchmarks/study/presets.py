"""Which cells a preset has, in the order in which they are measured: what matters most comes first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from .cells import CENTRALISED, FROZEN, ONE_SHOT, Cell
from .measure import UNPRETRAINED
from .rounds import ALGORITHMS
from .tasks import TASKS

PACKAGES, SPEAKERS = "stdlib, by package", "shakespeare, by speaker"
MAIN = "0.3M"  # the base of whatever needs many runs
ROUNDS = (2, 3, 5, 10)
MORE_ROUNDS = (2, 3, 4, 5, 10, 20, 60)  # the last: after every step
Recipe = tuple[float, float]  # times the task's learning rate, times its epochs

EVERY = tuple(product(ALGORITHMS, (3, 10)))
TEN, FEDAVG = tuple(product(ALGORITHMS, (10,))), (("fedavg", 3), ("fedavg", 10))
LONGER = (1.0, 4.0)  # tried as well where twice the epochs were chosen
TUNED = ((1 / 3, 1.0), (1.0, 1.0), (10 / 3, 1.0), (1 / 3, 2.0), (1.0, 2.0))  # of the task's learning rate and epochs
SERVER_LEARNING_RATES = {
    "fedavgm": (0.3,),
    "fedadam": (1e-3, 1e-2),
    "fedyogi": (1e-3, 1e-2),
    "diloco": (0.3,),
}
CLIENTS = (3, 10, 30, 100, 300)
MANY = 1200  # examples where clients are up to 300, so that each has a batch
MANY_EPOCHS = 5.0
ALPHAS = ("0.1", "0.5", "1", "inf")
RANKS = (2, 4, 8, 16, 32, 64)
LOCAL_EPOCHS = (0.2, 0.4, 1.0, 2.0, 4.0)  # of the task's


def main_arms(base: str, task: str, seed: int) -> Iterator[Cell]:
    """One round, centralised, and FedAvg of three and ten."""
    cell = Cell(base, task, ONE_SHOT, seed)
    yield cell
    yield replace(cell, algorithm=CENTRALISED)
    for rounds in (3, 10):
        yield replace(cell, algorithm="fedavg", rounds=rounds)


def algorithms(base: str, task: str, seed: int, rounds: Sequence[int] = ROUNDS) -> Iterator[Cell]:
    """Every multi-round algorithm, at equal total steps."""
    for name, count in product(ALGORITHMS, rounds):
        yield Cell(base, task, name, seed, count)


def tuned(
    base: str, task: str, seed: int, arms: Sequence[tuple[str, int]] = EVERY, settings: Sequence[Recipe] = TUNED
) -> Iterator[Cell]:
    """One round, centralised, and these algorithms in so many rounds, over learning rates, epochs and what else they
    have, for each to be chosen on validation."""
    for rate, epochs in settings:
        cell = times(Cell(base, task, ONE_SHOT, seed), rate, epochs)
        yield cell
        yield replace(cell, algorithm=CENTRALISED)
        for name, rounds in arms:
            yield replace(cell, algorithm=name, rounds=rounds)
    for name, rounds in arms:
        for server in SERVER_LEARNING_RATES.get(name, ()):
            yield Cell(base, task, name, seed, rounds, server_learning_rate=server)
        if name == "fedavg":
            yield Cell(base, task, name, seed, rounds, continued=True)


def times(cell: Cell, rate: float, epochs: float) -> Cell:
    """So many times the task's learning rate and epochs; those that are as the task says stay unsaid."""
    own = TASKS[cell.task]
    return replace(
        cell,
        learning_rate=0.0 if rate == 1 else float(f"{rate * own.learning_rate:.2g}"),
        epochs=0.0 if epochs == 1 else epochs * own.epochs,
    )


def more_rounds(base: str, task: str, seed: int) -> Iterator[Cell]:
    """One to five rounds, and down to one step in each."""
    for rounds in MORE_ROUNDS:
        yield Cell(base, task, "fedavg", seed, rounds)


def clients(base: str, task: str, seed: int) -> Iterator[Cell]:
    """The same examples cut finer and finer."""
    for count in CLIENTS:
        cell = Cell(base, task, ONE_SHOT, seed, clients=count, examples=MANY, epochs=MANY_EPOCHS)
        yield cell
        yield replace(cell, algorithm="fedavg", rounds=5)
    yield Cell(base, task, CENTRALISED, seed, examples=MANY, epochs=MANY_EPOCHS)


def heterogeneity(base: str, task: str, seed: int) -> Iterator[Cell]:
    """Dirichlet's α. What is pooled is the same for all, so the task's own centralised run serves."""
    for alpha in ALPHAS:
        cell = Cell(base, task, ONE_SHOT, seed, dealt=alpha)
        yield cell
        for rounds in (3, 10):
            yield replace(cell, algorithm="fedavg", rounds=rounds)


def local_epochs(base: str, task: str, seed: int) -> Iterator[Cell]:
    for epochs in LOCAL_EPOCHS:
        for cell in main_arms(base, task, seed):
            yield times(cell, 1.0, epochs)


def ranks(base: str, task: str, seed: int) -> Iterator[Cell]:
    for rank in RANKS:
        for cell in main_arms(base, task, seed):
            if cell.rounds != 10:
                yield replace(cell, rank=rank)


def frozen(base: str, task: str, seed: int) -> Iterator[Cell]:
    yield Cell(base, task, FROZEN, seed)


def quick() -> Iterator[Cell]:
    """One seed of the smallest base: to see that all of it works, and roughly what comes out."""
    for task in (PACKAGES, SPEAKERS):
        yield from main_arms(MAIN, task, 0)
    yield from frozen(MAIN, PACKAGES, 0)
    yield from algorithms(MAIN, PACKAGES, 0, (3,))
    yield from main_arms(MAIN + UNPRETRAINED, PACKAGES, 0)
    for alpha in ("0.1", "inf"):
        yield Cell(MAIN, PACKAGES, ONE_SHOT, 0, dealt=alpha)


def paper() -> Iterator[Cell]:
    """Three seeds; larger bases where it matters, the smallest where many runs are needed."""
    seeds = range(3)
    for task, seed in product((SPEAKERS, PACKAGES, "stdlib, random", "dolly, by category", "gsm8k"), seeds):
        yield from main_arms(MAIN, task, seed)
    for task, seed in product((SPEAKERS, PACKAGES), seeds):
        yield from frozen(MAIN, task, seed)
        yield from more_rounds(MAIN, task, seed)
    for seed in seeds:
        yield from algorithms(MAIN, SPEAKERS, seed)
        yield from algorithms(MAIN, PACKAGES, seed, (3, 10))
    for base, task, seed in product(("1.3M", MAIN + UNPRETRAINED, "1.3M" + UNPRETRAINED), (SPEAKERS, PACKAGES), seeds):
        yield from main_arms(base, task, seed)
    for sweep, seed in product((heterogeneity, clients, ranks, local_epochs), seeds):
        yield from sweep(MAIN, SPEAKERS, seed)
    for seed in seeds:
        yield from tuned(MAIN, SPEAKERS, seed, (("fedavg", 3), *TEN), (*TUNED, LONGER))
        yield from tuned(MAIN, PACKAGES, seed, FEDAVG)
    for task, seed in product((SPEAKERS, PACKAGES), seeds):
        yield from main_arms("stories260K", task, seed)
    for base, seed in product(("5M", "5M" + UNPRETRAINED), seeds):
        yield from main_arms(base, SPEAKERS, seed)


def full() -> Iterator[Cell]:
    """Everything for every base: a day or more."""
    yield from paper()
    seeds = range(5)
    for size, task, seed in product((MAIN, "1.3M", "5M", "stories260K"), TASKS, seeds):
        for base in (size, size + UNPRETRAINED):
            yield from main_arms(base, task, seed)
            yield from frozen(base, task, seed)
            yield from algorithms(base, task, seed)
            yield from more_rounds(base, task, seed)
        yield from tuned(size, task, seed, settings=(*TUNED, LONGER))
        if TASKS[task].dealt == "groups":
            yield from heterogeneity(size, task, seed)
        yield from local_epochs(size, task, seed)
        yield from ranks(size, task, seed)
        if TASKS[task].dealt == "groups":
            yield from clients(size, task, seed)


PRESETS = {"quick": quick, "paper": paper, "full": full}
