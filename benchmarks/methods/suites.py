"""The tasks of each suite: a recipe's words, what is scored, and how often a method is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.methods.catalog import CORE
from benchmarks.methods.search import Budget

QUICK = Budget(tuning=(0, 1), seeds=(10, 11, 12, 13, 14))  # runs of less than a minute
SLOW = Budget(tuning=(0,), seeds=(10, 11, 12))


@dataclass(frozen=True, eq=False)
class Task:
    """What methods are compared on.

    Attributes:
        label: as the tables have it.
        words: of a command line.
        score: the name under which validation and test log it, a fraction.
        better: max or min.
        source: what the test logs of the domain that the base comes from, with the adapter on and off; of a
            task that logs none of it, `source_data` gives the data to test on by the same score.
        changes: sections of the configuration that are other ones, such as a class of the benchmark's own.
        methods: those that are worth its minutes, None all.
        centres: where the rates of a word of `method=` begin; else the recipe's `rates`.
    """

    label: str
    words: tuple[str, ...]
    score: str
    better: str = "max"
    budget: Budget = QUICK
    source: tuple[str, str] | None = None
    source_data: Callable[[], Any] | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    methods: tuple[str, ...] | None = None
    centres: Mapping[str, float] = field(default_factory=dict)


MINUTES = (*CORE, "norms", "rslora", "dora", "orthogonal", "pissa", "lora_plus", "scaled_adamw")


def _filled_shapes() -> Any:
    from lora_lightning.data.shapes import ShapesDataModule

    return ShapesDataModule("source", test_size=100)


EMBEDDED = {
    "vit_digits": Task("ViT, digits", ("recipe=vit_digits",), "acc", source=("source", "source_off")),
    "resnet_digits": Task(
        "ResNet, digits", ("recipe=resnet_digits",), "acc", source=("source", "source_off")
    ),
    "fcos_shapes": Task(
        "FCOS, shapes",
        ("recipe=fcos_shapes",),
        "map",
        budget=SLOW,
        methods=MINUTES,
        source_data=_filled_shapes,
    ),
    "scottish": Task(
        "Conformer, Scottish English",
        ("recipe=accent_espeak", "adapters=null"),
        "wer",
        better="min",
        budget=SLOW,
        methods=MINUTES,
        source=("wer_us", ""),
    ),
}
SUITES: dict[str, dict[str, Task]] = {"embedded": EMBEDDED}
ORDER = {"embedded": (("vit_digits", "resnet_digits"), ("fcos_shapes", "scottish"))}


def cells(
    suite: str, tasks: list[str], methods: list[str], known: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Tasks and methods in the order in which they are trained: what matters most first."""
    pairs = []
    for of in ORDER[suite]:
        for group in (CORE, [m for m in known if m not in CORE]):
            pairs += [(t, m) for m in group for t in of if t in tasks and m in methods]
    return [(t, m) for t, m in pairs if _has(SUITES[suite][t].methods, m) and _has(known[m].only, t)]


def _has(some: tuple[str, ...] | None, name: str) -> bool:
    return some is None or name in some
