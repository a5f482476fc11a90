"""The search space of `search.space`: options under their own names, each with choices or a range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.utils.marks import is_number, is_whole, show

SEARCH = ("study", "storage", "trials", "fraction", "prune", "space")  # options of a search
KEYS = ("low", "high", "log", "step")
FORM = "give a list of choices, or a range such as {low: 1e-4, high: 1e-2, log: true}"


def leaves(space: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a space by dotted name, with a list of choices or a range."""
    for key, value in space.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            yield from leaves(value, here)
        else:
            yield here, value


def ends(leaf: Any) -> list[Any]:
    """The choices, or both ends of a range."""
    return list(leaf) if isinstance(leaf, list) else [leaf["low"], leaf["high"]]


def suggested(trial: Any, name: str, leaf: Any) -> Any:
    """A value of an option, as a trial of Optuna's suggests it."""
    if isinstance(leaf, list):
        return trial.suggest_categorical(name, leaf)
    low, high, log, step = (leaf.get(key) for key in KEYS)
    if is_whole(low) and is_whole(high):
        return trial.suggest_int(name, low, high, log=bool(log), step=step or 1)
    return trial.suggest_float(name, float(low), float(high), log=bool(log), step=step)


def search_problems(
    config: DictConfig, values: Mapping[str, Any], check: Callable[[DictConfig], list[str]]
) -> list[str]:
    """What is wrong with a search: its space, and what does not go with it.

    Args:
        config: the whole configuration.
        values: the same, resolved to plain values.
        check: every problem of a configuration.
    """
    problems = _space_problems(config, values["search"].get("space"), check)
    if find_spec("optuna") is None:
        problems.append("hparams_search=optuna: Optuna is not installed: pip install 'lora-lightning[tune]'")
    trainer = values.get("trainer")
    devices = trainer.get("devices") if isinstance(trainer, Mapping) else 1
    if devices not in (1, "auto"):
        problems.append(
            f"trainer.devices={show(devices)}: a process of a search has its own trials; give "
            "trainer.devices=1 and start it in several shells."
        )
    adapters = values.get("adapters")
    if isinstance(adapters, Mapping) and any(options is not None for options in adapters.values()):
        problems.append("adapters: a search is of one adapter: give adapters=null and its options.")
    if values.get("method") == "none":
        problems.append("method=none: trains nothing that could be searched; give another method.")
    return problems


def _space_problems(config: DictConfig, space: Any, check: Callable[[DictConfig], list[str]]) -> list[str]:
    """The form of a space, and every value at its ends, by the check of a configuration."""
    found = dict(leaves(space)) if isinstance(space, Mapping) else {}
    if not found:
        return [f"search.space={show(space)}: {FORM} for at least one option."]
    problems = [p for name, leaf in found.items() if (p := _form(name, leaf))]
    if problems:
        return problems
    bare = config.copy()
    OmegaConf.set_struct(bare, False)
    bare.search = None
    known = set(check(bare))
    for name, leaf in found.items():
        for value in ends(leaf):
            one = bare.copy()
            try:
                OmegaConf.update(one, name, value, force_add=True)
                problems += [f"search.space: {p}" for p in check(one) if p not in known]
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                problems.append(f"search.space.{name}: {str(error).splitlines()[0]}")
    return list(dict.fromkeys(problems))


def _form(name: str, leaf: Any) -> str | None:
    low: Any
    high: Any
    where = f"search.space.{name}={show(leaf)}"
    if isinstance(leaf, list):
        return None if leaf else f"{where}: {FORM}."
    if not isinstance(leaf, Mapping) or not {"low", "high"} <= leaf.keys() or leaf.keys() - set(KEYS):
        return f"{where}: {FORM}."
    low, high, log, step = (leaf.get(key) for key in KEYS)
    if not (is_number(low) and is_number(high) and low < high):
        return f"{where}: give numbers, low below high."
    if not (log is None or isinstance(log, bool)) or not (step is None or (is_number(step) and step > 0)):
        return f"{where}: give log as true or false, step as a number above 0."
    if log and (low <= 0 or step is not None):
        return f"{where}: with log give low above 0, and no step."
    return None
