"""What a run has left in its folder, read for its page: plain files alone, and nothing in them is run."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.report.metrics import Metrics, read_metrics
from lora_lightning.report.page import Section, left
from lora_lightning.utils.mapping_file import read_mapping, read_values

FACTS, UPDATES = "report/run.json", "report/updates.json"
CONFIG, RESULTS = "config.yaml", "results.json"
MOST_DIGITS = 10  # after a score's point
NUMBERS = ("trained", "total", "seconds", "checkpoint_bytes", "best_validation")  # of a result
REMEDY = "Nothing in it was run; a file of a run holds plain values alone. Copy it anew."


@dataclass(frozen=True)
class Shown:
    """A score as a page shows it; see `lora_lightning.tasks.scores.Score`."""

    name: str
    label: str
    scale: float = 100.0
    digits: int = 1
    best: str = "max"

    @property
    def plain(self) -> str:
        """The label without its unit."""
        return self.label.removesuffix(" %")

    @property
    def unit(self) -> str:
        return " %" if self.label.endswith(" %") else ""

    def number(self, value: float | None) -> str:
        """A value in the score's unit, without it."""
        return "–" if value is None else f"{self.scale * value:.{self.digits}f}"

    def interval(self, bounds: Any) -> str:
        """`38.7–46.7`; empty without one."""
        if not bounds:
            return ""
        low, high = map(self.number, bounds)
        return f"{low}{' to ' if low.startswith('-') else '–'}{high}"


@dataclass(frozen=True)
class LeftRun:
    """A run's folder.

    Attributes:
        config: as it was resolved.
        facts: what the run says of itself, `report/run.json`; nothing of a run of an older version.
        results: a method each, in the order of the final table; none of a run that has not ended.
        updates: the spectra of its updates, by layer, as `report/updates.json` has them.
        title, sections: what its task has left for the page.
        adapters: of a run of several, the folder of each by its name.
    """

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    results: list[dict[str, Any]]
    updates: list[dict[str, Any]]
    title: str
    sections: list[Section]
    adapters: dict[str, Path] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Of the run itself, not those that it is compared with."""
        return str(self.config.get("method", "lora"))

    @property
    def ended(self) -> bool:
        """Whether its results are there, which are the last that a run writes."""
        return bool(self.results) or (bool(self.adapters) and (self.folder / RESULTS).is_file())

    @property
    def result(self) -> dict[str, Any]:
        """Of the run's own method; empty where there is none."""
        return next((r for r in self.results if r.get("method") == self.method), {})

    @property
    def before(self) -> dict[str, Any]:
        """Scores and intervals of the base, where it was tested: by compare, or by the task with its adapter
        off."""
        base = next((r for r in self.results if r.get("method") == "none"), None)
        return base if base is not None else _result(mapping(self.facts.get("before")))

    @cached_property
    def scores(self) -> list[Shown]:
        """Of the task, the one that counts first; those of the results' names where it says nothing."""
        known = [_shown(s) for s in listing(self.facts.get("scores"))]
        names = self.result.get("scores", {})
        return [s for s in known if s] or [Shown(name, name, 1.0, 4) for name in names]

    @property
    def main(self) -> Shown | None:
        """The one number that matters."""
        tested = self.result.get("scores", {})
        return next((s for s in self.scores if not tested or s.name in tested), None)

    def labels(self) -> dict[str, str]:
        """Methods in words, the run's own first."""
        found = {str(r["method"]): str(r["label"]) for r in listing(self.facts.get("labels")) if _labelled(r)}
        others = listing(self.config.get("compare"))
        names = dict.fromkeys([self.method, *(m for m in others if _is_folder_name(m))])
        return {name: found.get(name, name) for name in names}

    @cached_property
    def metrics(self) -> dict[str, Metrics]:
        """What was logged, by method, the run's own first; those with something alone."""
        places = {m: self.folder if m == self.method else self.folder / m for m in self.labels()}
        found = {method: read_metrics(place) for method, place in places.items()}
        return {method: metrics for method, metrics in found.items() if metrics}


def read_run(folder: Path) -> LeftRun:
    """What a run's folder holds.

    Raises:
        UserError: it is no run's, or a file in it is damaged.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file. Give the folder of a run{_meant(folder)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Give one that a run has named.")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: is not a run's folder: it has no {CONFIG}. Give one{_meant(folder)}")
    config = read_mapping(folder / CONFIG, REMEDY)
    names = config.get("adapters") if isinstance(config.get("adapters"), dict) else {}
    adapters = {n: folder / n for n, v in (names or {}).items() if v is not None and _is_folder_name(n)}
    title, sections = left(folder)
    results = [] if adapters else _read_list(folder / RESULTS)
    return LeftRun(
        folder,
        config,
        read_mapping(folder / FACTS, REMEDY) if (folder / FACTS).is_file() else {},
        [_result(r) for r in results if isinstance(r, dict)],
        [layer for layer in _read_list(folder / UPDATES) if isinstance(layer, dict)],
        title,
        sections,
        adapters,
    )


def _meant(place: Path) -> str:
    """The run that a place lies in, or the last one in it; the words after `Give one`."""
    near = [place.parent] if (place.parent / CONFIG).is_file() else []
    near += sorted((f.parent for f in place.glob(f"*/{CONFIG}")), key=str)[-1:]
    return f": is {near[0]} meant?" if near else " such as outputs/vit_digits/DATE."


def _read_list(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    found = read_values(path, REMEDY)
    if not isinstance(found, list):
        raise AdapterFileError(f"{path} is damaged: it holds no list. {REMEDY}")
    return found


def _shown(values: Any) -> Shown | None:
    try:
        label, best = str(values["label"]), str(values.get("best", "max"))
        scale, digits = float(values["scale"]), int(values["digits"])
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return None
    if not math.isfinite(scale) or not 0 <= digits <= MOST_DIGITS:
        return None
    return Shown(str(values["name"]), label, scale, digits, best)


def _is_folder_name(name: Any) -> bool:
    """Whether it names a folder within the run's, and no place outside it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _labelled(values: Any) -> bool:
    return isinstance(values, dict) and {"method", "label"} <= values.keys()


def _result(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a method gave, without what is of another kind; empty of nothing."""
    scores = {str(n): v for n, v in mapping(values.get("scores")).items() if is_number(v)}
    pairs = {str(n): v for n, v in mapping(values.get("intervals")).items() if isinstance(v, list)}
    kept = {n: values[n] for n in NUMBERS if is_number(values.get(n))}
    if not scores and not kept:
        return {}
    intervals = {n: v for n, v in pairs.items() if len(v) == 2 and all(map(is_number, v))}
    return kept | {"method": values.get("method"), "scores": scores, "intervals": intervals}


def is_number(value: object) -> bool:
    """A finite one, no larger than a float can be."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def mapping(value: Any) -> Mapping[str, Any]:
    """A value of a file that should be a mapping; nothing of one of another kind."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """The same of a list."""
    return value if isinstance(value, list) else []
