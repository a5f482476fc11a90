"""`tune=lr`, `tune=[lr,rank]`: the rate of each method, then the rank, chosen on validation data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lora_lightning.app.build import compared_config, rate_of
from lora_lightning.app.console import say
from lora_lightning.app.methods import METHODS, RANKED, compared
from lora_lightning.app.trial import Tried, shortened, tried
from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.mapping_file import read_values
from lora_lightning.utils.ranks import on_rank_zero
from lora_lightning.utils.tables import format_table

FILE = "tuning.json"
NAMES = {"lr": "optim.lr", "rank": "lora.rank"}  # what is swept, in this order


@dataclass(frozen=True)
class Entry:
    """A value that was tried for an option of a method."""

    method: str
    option: str
    value: float
    score: float | None
    monitor: str
    mode: str
    reason: str = ""

    @property
    def tried(self) -> Tried:
        """Its worth."""
        return Tried(self.score, self.monitor, self.mode, self.reason)


class Trials:
    """The trials of a run, kept in its folder as they end, so that a resumed run does not repeat them."""

    def __init__(self, folder: Path, goes_on: bool) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.chosen: dict[tuple[str, str], float] = {}  # by method and option
        self.entries = _kept(self.path) if goes_on and self.path.is_file() else []

    def of(self, config: DictConfig, option: str, value: float) -> Tried:
        """The worth of a value, tried now unless it was."""
        method = config.method
        for entry in self.entries:
            if (entry.method, entry.option, entry.value) == (method, option, value):
                return entry.tried
        one = shortened(config, config.tuning.fraction)
        _set(one, option, value)
        what = f"{METHODS[method].label}, {option}={value:.3g}"
        found = tried(one, self.folder / "tuning" / f"{method}_{option}_{value:g}", what=what)
        self.entries.append(Entry(method, option, value, *found))
        self.write()
        told = found.reason if found.score is None else f"{found.monitor} {found.score:.4g}"
        say(f"  {what}: {told}")
        return found

    def write(self) -> None:
        """Keep what was tried, and which was taken."""
        rows = [
            {**asdict(e), "chosen": self.chosen.get((e.method, e.option)) == e.value} for e in self.entries
        ]
        if on_rank_zero():
            text = json.dumps(rows, indent=2) + "\n"
            write_whole(self.path, lambda file: Path(file).write_text(text))


def _kept(path: Path) -> list[Entry]:
    """The trials that a file holds.

    Raises:
        AdapterFileError: it is damaged.
    """
    remedy = "Delete it: the trials are then made again."
    kept = read_values(path, remedy)
    try:
        return [Entry(**{k: v for k, v in entry.items() if k != "chosen"}) for entry in kept]
    except (TypeError, AttributeError):
        raise AdapterFileError(f"{path} is damaged: it is no list of trials. {remedy}") from None


def tuned(config: DictConfig, folder: Path, goes_on: bool) -> DictConfig:
    """The configuration with the values that do best on validation data: the rate of the run's own method and
    of each that it is compared with, then LoRA's rank at that rate.

    Args:
        goes_on: whether the run is resumed, and its trials are taken up.

    Raises:
        UserError: no value of an option gives a score.
        ConfigError: as `tried`.
    """
    wanted = config.tune if isinstance(config.tune, str) else list(config.tune)
    wanted = [wanted] if isinstance(wanted, str) else wanted
    config = config.copy()
    trials = Trials(folder, goes_on)
    epochs = shortened(config, config.tuning.fraction).trainer.max_epochs
    say(f"\nTuning {' and '.join(wanted)} on validation data, {epochs} epochs a trial:")
    for option in [o for o in NAMES if o in wanted]:
        for method in _methods(config, option):
            own = method == config.method
            one = config if own else compared_config(config, method, folder)
            value = swept(one, option, partial(trials.of, one, option))
            trials.chosen[method, option] = value
            trials.write()
            if own or option == "rank":
                _set(config, option, value)
            else:
                config.rates[method] = rate_of(config, value)
    say(f"\n{table(trials)}\n")
    return config


def _methods(config: DictConfig, option: str) -> list[str]:
    """Whose option is swept: of the rank, which all have in common, the run's own or the first's."""
    every = [config.method, *(m for m in compared(config.method, config.compare) if m != config.method)]
    if option == "lr":
        return [m for m in every if m != "none"]
    return [m for m in every if m in RANKED][:1]


def swept(config: DictConfig, option: str, worth: Callable[[float], Tried]) -> float:
    """The best value of a geometric grid around the configured one, which grows at the end at which the best
    lies until it lies inside, or as many were tried as may be.

    Args:
        worth: of a value.

    Raises:
        UserError: no value gives a score.
    """
    tuning = config.tuning
    begin = OmegaConf.select(config, NAMES[option])
    beside = tuning.points // 2
    values = {_step(option, begin, tuning.factor, k): None for k in range(-beside, tuning.points - beside)}
    found = {value: worth(value) for value in sorted(values)}
    while True:
        best = _best(found, begin)
        if best is None:
            reason = next(iter(found.values())).reason
            raise UserError(
                f"tune={option}: none of {', '.join(f'{v:.3g}' for v in found)} gives a score ({reason}). "
                f"Begin with another {NAMES[option]}."
            )
        low, high = min(found), max(found)
        further = _step(option, best, tuning.factor, -1 if best == low else 1)
        if best not in (low, high) or further in found or len(found) >= tuning.most:
            return best
        found[further] = worth(further)


def _best(found: dict[float, Tried], begin: float) -> float | None:
    """The value of most worth; of equals the one nearest to the configured, then the smaller."""
    best = None
    for value in sorted(found, key=lambda v: (max(v / begin, begin / v), v)):
        if found[value].score is not None and (best is None or found[value].better(found[best])):
            best = value
    return best


def _step(option: str, value: float, factor: float, steps: int) -> float:
    """A value some steps of the grid away: a rank is a whole number, at least 1."""
    moved = value * factor**steps
    return max(1, round(moved)) if option == "rank" else float(f"{moved:.4g}")


def _set(config: DictConfig, option: str, value: float) -> None:
    OmegaConf.update(config, NAMES[option], value)


def table(trials: Trials) -> str:
    """What was tried, by method and value, with the chosen ones marked."""
    head = ("method", "option", "value", trials.entries[0].monitor, "")
    return format_table(head, list(_rows(trials)))


def _rows(trials: Trials) -> Iterator[tuple[str, ...]]:
    for key, best in trials.chosen.items():
        same = [e for e in trials.entries if (e.method, e.option) == key]
        same.sort(key=lambda e: e.value)
        told = "chosen, at the edge" if best in (same[0].value, same[-1].value) else "chosen"
        for e in same:
            score = "–" if e.score is None else f"{e.score:.4g}"
            yield METHODS[e.method].label, e.option, f"{e.value:.3g}", score, told if e.value == best else ""
