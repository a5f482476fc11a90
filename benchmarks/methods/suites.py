"""The tasks of each suite: a recipe's words, what is scored, and how often a method is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.methods.catalog import CORE
from benchmarks.methods.search import Budget

QUICK = Budget(tuning=(0,), seeds=(10, 11, 12, 13, 14))  # runs of less than a minute
SLOW = Budget(tuning=(0,), seeds=(10, 11, 12))
STEADY = Budget(tuning=(0, 1), seeds=(10, 11, 12))  # where one seed cannot tell two rates apart


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
        curve: the few-shot curve on which it lies, and where: a number of samples or minutes.
        by_commands: trained by the application's commands, in processes of their own, as a user would.
        trial: words that make a trial by commands shorter than a run.
        methods: those that are worth its minutes, None all.
        centres: where the rates of a word of `method=` begin; else the recipe's `rates`.
        rates_of: the task whose trials choose the rates, where trials of its own would take too long.
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
    curve: tuple[str, float] | None = None
    by_commands: bool = False
    trial: tuple[str, ...] = ()
    rates_of: str = ""


MINUTES = (*CORE, "dora", "pissa", "lora_plus")


def _filled_shapes() -> Any:
    from lora_lightning.data.shapes import ShapesDataModule

    return ShapesDataModule("source", test_size=100)


DIGITS_CURVE = "ViT, digits: images a class"
EMBEDDED = {
    "vit_digits": Task(
        "ViT, digits",
        ("recipe=vit_digits",),
        "acc",
        source=("source", "source_off"),
        curve=(DIGITS_CURVE, 30),
    ),
    "resnet_digits": Task(
        "ResNet, digits", ("recipe=resnet_digits",), "acc", source=("source", "source_off")
    ),
    "fcos_shapes": Task(
        "FCOS, shapes",
        ("recipe=fcos_shapes",),
        "map",
        methods=MINUTES,
        source_data=_filled_shapes,
    ),
    "fasterrcnn_shapes": Task(
        "Faster R-CNN, shapes",
        ("recipe=fasterrcnn_shapes",),
        "map",
        methods=(
            "before",
            "lora",
            "full",
            "peft",
            "dora",
            "pissa",
            "lora_one",
            "box_head_in_full",
            "box_head_scaled",
            "lora_plus",
            "rank_64",
        ),
        source_data=_filled_shapes,
    ),
    "scottish": Task(
        "Conformer, Scottish English",
        ("recipe=accent_espeak", "adapters=null"),
        "wer",
        better="min",
        methods=MINUTES,
        source=("wer_us", ""),
    ),
}
FEW = ("lora", "full", "probe", "pissa")  # on the curves


def _digits(shots: int) -> Task:
    """Of so many images a class, with about as many steps as of 30."""
    epochs = round(25 * 10 / -(-10 * shots // 32))
    words = ("recipe=vit_digits", f"data.train_size={10 * shots}", f"trainer.max_epochs={epochs}")
    return Task(
        f"ViT, digits, {shots} a class",
        words,
        "acc",
        methods=(*FEW, "lora_one"),  # which asks for a head that is trained
        source=("source", "source_off"),
        curve=(DIGITS_CURVE, shots),
    )


FEW_DIGITS = {f"vit_digits_{shots}": _digits(shots) for shots in (5, 10, 50, 90)}


def _fashion(shots: int) -> Task:
    from benchmarks.methods import fashion

    return Task(
        f"EfficientNet-Lite0, Fashion-MNIST, {shots} a class",
        (*fashion.WORDS, f"trainer.max_epochs={fashion.EPOCHS[shots]}"),
        "acc",
        budget=STEADY if shots == 100 else SLOW,
        methods=MINUTES if shots == 100 else FEW,
        changes={
            "model": {"_target_": "benchmarks.methods.fashion.lite0"},
            "data": {"_target_": "benchmarks.methods.fashion.FashionPictures", "shots": shots},
        },
        centres={
            "lora": 3e-3,
            "full": 3e-3,
            "linear_probe": 1e-2,
            "peft": 3e-3,
            "bitfit": 1e-2,
            "norm_only": 1e-2,
        },
        curve=("Lite0, Fashion-MNIST: pictures a class", shots),
    )


LANGUAGES = {"czech": "cs", "dutch": "nl"}
CZECH_CURVE = "Whisper base, Czech: minutes of speech"
HOUR = 66  # minutes of all of Czech
PASSES = {1: 4, 3: 3, 10: 3, 30: 1}  # over so many minutes
SINGLE = ("trainer.precision=32-true",)  # faster than bf16-mixed on a CPU without AMX
OF_MINUTES = {
    1: (*SINGLE, "trainer.check_val_every_n_epoch=2"),  # each pass is shorter than a validation
    10: (),  # trained before the two precisions were timed
}
SHORT = ("trainer.max_steps=80", "trainer.val_check_interval=80")  # a trial on an hour, a quarter of a pass


def _whisper(
    language: str, also: str = "", words: tuple[str, ...] = (), passes: int = 1, **fields: Any
) -> Task:
    """By the application's commands, a seed at Czech's rates, unless the fields say otherwise."""
    recipe = (
        "recipe=whisper_manifest",
        f"data.manifest={language}.csv",
        f"model.language={LANGUAGES[language]}",
    )
    given = {"budget": Budget(tuning=(0,), seeds=(1,)), "methods": ("lora", "full"), "rates_of": "czech"}
    return Task(
        f"Whisper base, {language.capitalize()}{also}",
        (*recipe, *words, f"trainer.max_epochs={passes}"),
        "wer",
        better="min",
        centres={"lora": 1e-3, "full": 2e-5, "peft": 1e-3},
        by_commands=True,
        **given | fields,
    )


def _czech(minutes: int) -> Task:
    """So many minutes of it. One wants rates of its own, which three take too."""
    return _whisper(
        "czech",
        f", {minutes} minutes" if minutes > 1 else ", a minute",
        (f"data.train_minutes={minutes}", *OF_MINUTES.get(minutes, SINGLE)),
        PASSES[minutes],
        rates_of={1: "", 3: "czech_1"}.get(minutes, "czech"),
        curve=(CZECH_CURVE, minutes),
    )


REAL = {
    **{f"lite0_{shots}": _fashion(shots) for shots in (100, 10, 50, 5)},
    "czech": _whisper(
        "czech",
        budget=Budget(tuning=(0,), seeds=(1, 2)),
        methods=("before", "lora", "peft", "full"),
        rates_of="",
        trial=SHORT,
        curve=(CZECH_CURVE, HOUR),
    ),
    "dutch": _whisper("dutch", words=SINGLE, methods=("before", "lora", "full")),
    "czech_passes": _whisper("czech", ", 2 passes", passes=2),
    **{f"czech_{minutes}": _czech(minutes) for minutes in PASSES},
}
SUITES: dict[str, dict[str, Task]] = {"embedded": EMBEDDED | FEW_DIGITS, "real": REAL}
ORDER = {
    "embedded": (
        ("vit_digits", "resnet_digits"),
        ("fasterrcnn_shapes",),
        ("scottish",),
        ("fcos_shapes",),
        tuple(FEW_DIGITS),
    ),
    "real": (
        ("czech",),
        ("czech_passes",),
        ("lite0_100",),
        ("lite0_10",),
        ("dutch",),
        ("lite0_50", "lite0_5", *(f"czech_{minutes}" for minutes in PASSES)),
    ),
}


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
