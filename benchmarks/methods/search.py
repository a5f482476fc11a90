"""Which runs a method gets: the trials of its rate on validation data, then seeds of its own at the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from statistics import mean

from benchmarks.methods.ledger import Found, Ledger

POINTS, FACTOR = 5, 10 ** (1 / 3)  # rates of every method: a decade and a third
WIDER = 4  # rates beyond the first ones at most, where the best is at an edge
Train = Callable[[str, float, int], Found]  # stage, rate, seed


@dataclass(frozen=True)
class Budget:
    """How often a method is trained.

    Attributes:
        tuning: seeds of each rate's trials.
        seeds: others, at the chosen rate, on which alone the table rests.
    """

    tuning: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (1, 2, 3)


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    Attributes:
        centre: the rate around which the first ones lie.
        better: of the validation score, max or min.
        rates_of: the task whose trials choose the rate; "" this one's own.
    """

    task: str
    method: str
    centre: float
    better: str
    budget: Budget
    rates_of: str = ""


def grid(centre: float) -> list[float]:
    """The first rates, evenly spaced in the logarithm, of two digits."""
    half = POINTS // 2
    return [_rounded(centre * FACTOR**i) for i in range(-half, POINTS - half)]


def carry_out(cell: Cell, ledger: Ledger, train: Train) -> float | None:
    """Train what of a cell is not in the ledger yet; returns the chosen rate, None where it is refused, or
    where the task whose rate it takes has none yet."""
    if not cell.centre:  # nothing trains
        return _done(cell, ledger, train, "final", 0.0, cell.budget.seeds[0])["lr"]
    if cell.rates_of:
        trials = [
            r for r in ledger.runs().values() if (r["task"], r["method"]) == (cell.rates_of, cell.method)
        ]
        rate = choice(trials, cell.better, cell.budget.tuning).rate
    else:
        rate = choose(cell, lambda lr, seed: _done(cell, ledger, train, "tune", lr, seed))
    if rate is None:
        return None
    for seed in cell.budget.seeds:
        _done(cell, ledger, train, "final", rate, seed)
    return rate


def choose(cell: Cell, run: Callable[[float, int], Found]) -> float | None:
    """The rate with the best mean validation score, the smaller one of two; where it is at an edge, the next
    beyond is tried too. None where the first trial is refused."""
    rates = grid(cell.centre)
    for _ in range(WIDER + 1):
        found: dict[float, list[Found]] = {}
        for lr, seed in product(rates, cell.budget.tuning):
            trial = run(lr, seed)
            if "refused" in trial:
                return None
            found.setdefault(lr, []).append(trial)
        best = _best(found, cell.better)
        if best not in (rates[0], rates[-1]):
            break
        beyond = best / FACTOR if best == rates[0] else best * FACTOR
        rates = sorted([*rates, _rounded(beyond)])
    return best


@dataclass(frozen=True)
class Choice:
    """What trials say.

    Attributes:
        rate: the best so far, None while the first rates are not all tried.
        tried: the rates that were.
        inside: whether the best lies between others.
    """

    rate: float | None
    tried: tuple[float, ...]
    inside: bool


def choice(runs: Iterable[Found], better: str, tuning: tuple[int, ...]) -> Choice:
    """What the trials among the runs of one method on one task say, finished or not."""
    found = {(r["lr"], r["seed"]): r for r in runs if r["stage"] == "tune" and "refused" not in r}
    whole = sorted({lr for lr, _ in found if all((lr, seed) in found for seed in tuning)})
    first = grid(next(iter(found.values()))["centre"]) if found else []
    if not found or not set(first) <= set(whole):
        return Choice(None, tuple(whole), False)
    best = _best({lr: [found[lr, seed] for seed in tuning] for lr in whole}, better)
    return Choice(best, tuple(whole), best not in (whole[0], whole[-1]))


def _done(cell: Cell, ledger: Ledger, train: Train, stage: str, lr: float, seed: int) -> Found:
    known = ledger.runs().get((cell.task, cell.method, stage, lr, seed))
    if known is not None and "refused" not in known:
        return known
    found: Found = {"task": cell.task, "method": cell.method, "stage": stage, "lr": lr, "seed": seed}
    found |= {"centre": cell.centre} | train(stage, lr, seed)
    if found != known:
        ledger.add(found)
        print(found, flush=True)
    return found


def _best(found: Mapping[float, list[Found]], better: str) -> float:
    sign = 1 if better == "max" else -1
    scores = {lr: sign * mean(_score(run, better) for run in runs) for lr, runs in found.items()}
    return max(sorted(scores), key=lambda lr: scores[lr])  # of two the smaller, which comes first


def _score(found: Found, better: str) -> float:
    """Of a run that has none, since it collapsed to numbers that are none, the worst."""
    value = found["val"]
    return value if value is not None else (-1e9 if better == "max" else 1e9)


def _rounded(lr: float) -> float:
    return float(f"{lr:.1e}")
