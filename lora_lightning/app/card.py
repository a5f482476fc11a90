"""The card of an adapter, README.md beside it: what was adapted to what, how well, and how it is loaded.

Markdown under the YAML that the Hugging Face hub reads. Whatever comes from a file is written so that it is
text there, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lora_lightning.app.base_names import Base
from lora_lightning.files.fingerprint import short
from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.origin import Origin
from lora_lightning.files.random_base import BASE_FILE
from lora_lightning.tasks.scores import Score
from lora_lightning.utils.tables import printable, span, truncate_list

LIBRARY = "lora-lightning"
DESCRIBED = ("name", "domain", "accent", "corpus", "target")  # options of data that say which these are
METRICS = {"acc": "accuracy", "miou": "mean_iou", "map": "mean_average_precision"}  # the hub's names of ours

UNITS = ("epochs", "steps")  # of a training


@dataclass(frozen=True)
class Kind:
    """What the hub calls a task, what the task is in words, and a command that uses an adapter of it."""

    tag: str
    words: str
    command: str


PICTURES = "lora-lightning predict adapter={to} images=FOLDER out="
SPEECH = Kind("automatic-speech-recognition", "speech recognition", "lora-lightning evaluate adapter={to}")
KINDS = {  # by the end of the task's name
    "ImageClassifier": Kind("image-classification", "image classification", f"{PICTURES}FILE.csv"),
    "ObjectDetector": Kind("object-detection", "object detection", f"{PICTURES}FOLDER"),
    "SemanticSegmenter": Kind("image-segmentation", "semantic segmentation", f"{PICTURES}FOLDER"),
    "SpeechRecognizer": Kind(
        SPEECH.tag, SPEECH.words, "lora-lightning transcribe recording.wav adapter={to}"
    ),
    "Seq2SeqRecognizer": SPEECH,
    "TransducerRecognizer": SPEECH,
}


@dataclass(frozen=True)
class Card:
    """What a card tells of.

    Attributes:
        to: the address under which the adapter will be found; empty where that is not known.
        before, after: results of the base and of the adapter, as results.json has them; empty where there
            are none.
        scores: how these are shown; None shows the numbers as they are.
        license: of the adapter, as the hub spells it; None where nobody has said.
        files: beside the card.
    """

    to: str
    saved: SavedAdapter
    origin: Origin
    recipe: str
    base: Base
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    scores: Sequence[Score] | None
    license: str | None
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last name of the address, without version and revision; else the recipe's."""
        return re.split(r"[@:]", self.to.rpartition("/")[2])[0] or self.recipe or "adapter"

    @property
    def kind(self) -> Kind | None:
        """Of the task, where that is known."""
        return KINDS.get(_last(_section(self.origin, "task").get("_target_")))

    @property
    def data(self) -> str:
        """The data in words; empty where they are not known."""
        node = _section(self.origin, "data")
        name = _last(node.get("_target_")).removesuffix("DataModule")
        told = [f"{k}={node[k]}" for k in DESCRIBED if isinstance(node.get(k), str)]
        return f"{name} ({', '.join(told)})" if told else name

    def rows(self) -> list[tuple[Score, Any, Any]]:
        """Each score with its values before and after; those that nobody has measured are left out."""
        before, after = self.before.get("scores", {}), self.after.get("scores", {})
        known = {score.name: score for score in self.scores or ()}
        names = [*known, *(n for n in after if n not in known)] if not known else list(known)
        found = [
            (known.get(name, Score(name, name, 1, 4)), _number(before.get(name)), _number(after.get(name)))
            for name in names
        ]
        return [row for row in found if row[1:] != (None, None)]


def text_of(card: Card) -> str:
    """The whole card."""
    return f"---\n{_front_matter(card)}---\n\n" + printable("\n".join(_body(card))) + "\n"


def _front_matter(card: Card) -> str:
    about: dict[str, Any] = {
        "library_name": "peft" if card.saved.foreign else LIBRARY,
        "tags": ["lora", LIBRARY, *(["peft"] if card.saved.foreign else [])],
    }
    if card.license:
        about["license"] = card.license
    if card.base.hub:
        about |= {"base_model": card.base.hub, "base_model_relation": "adapter"}
    if card.kind:
        about["pipeline_tag"] = card.kind.tag
    values = [
        {"type": METRICS.get(s.name, s.name), "name": s.label, "value": round(s.scale * after, s.digits + 2)}
        for s, _, after in card.rows()
        if after is not None
    ]
    if card.kind and values:
        data = card.data or "test data"
        result = {
            "task": {"type": card.kind.tag, "name": card.kind.words},
            "dataset": {"name": data, "type": re.sub(r"\W+", "-", data.partition(" ")[0].lower())},
            "metrics": values,
        }
        about["model-index"] = [{"name": card.name, "results": [result]}]
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)


def _body(card: Card) -> list[str]:
    what = "An adapter" if card.saved.plan.layers else "A trained head"
    purpose = f" for {card.kind.words}" if card.kind else ""
    on = f", trained on {_cell(card.data)}" if card.data else ""
    lines = [
        f"# {_cell(card.name)}",
        "",
        f"{what} of {_cell(card.base.name)}{purpose}{on} with "
        "[lora_lightning](https://pypi.org/project/lora-lightning/).",
        "",
        *_table(("", ""), _facts(card)),
    ]
    if card.rows():
        lines += [
            "",
            "## Results",
            "",
            "On the test data; intervals are of 95 %.",
            "",
            *_table(*results_of(card)),
        ]
    return [*lines, "", "## Use", "", *_use(card)]


def _facts(card: Card) -> list[tuple[str, str]]:
    saved = card.saved
    ranks = span([p.rank for p in saved.plan.layers], "{:d}")
    values = sum(t.numel() for t in saved.tensors.values())
    parts = [f"{len(saved.plan.layers)} layers", f"rank {ranks}"] if saved.plan.layers else []
    parts += ["DoRA"] if saved.config.use_dora else []
    trained = [f"recipe {card.recipe}"] if card.recipe else []
    trained += [_counted(saved.training[u], u) for u in UNITS if type(saved.training.get(u)) is int]
    licence = card.base.licence or "not known here: see where the base comes from"
    known = (
        f"{short(saved.fingerprint)} of {len(saved.fingerprint)} frozen tensors" if saved.fingerprint else ""
    )
    names = card.origin.facts.get("class_names") or []
    rows = [
        ("base", f"{card.base.name} ({saved.base_class})" if saved.base_class else card.base.name),
        ("base's fingerprint", known),
        ("base's licence", licence),
        ("adapter's licence", card.license or "not stated; the base's holds for the base"),
        ("adapter", ", ".join([*parts, f"{values:,} values"])),
        ("training", ", ".join(trained)),
        ("data", card.data),
        ("classes", f"{len(names)}: {truncate_list(list(map(str, names)), most=20)}" if names else ""),
        ("files", ", ".join(card.files)),
    ]
    return [row for row in rows if row[1]]


def results_of(card: Card) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of scores; no rows where nobody has measured."""
    intervals = [card.before.get("intervals", {}), card.after.get("intervals", {})]
    rows = [
        (
            score.label,
            *(score.show(v, _interval(i.get(score.name))) for v, i in zip(values, intervals, strict=True)),
        )
        for score, *values in card.rows()
    ]
    if card.before:
        return ("score", "before", "after"), rows
    return ("score", "after"), [(label, after) for label, _, after in rows]


def _use(card: Card) -> list[str]:
    to = card.to or "FOLDER"
    lines = ["```", "pip install 'lora-lightning[all]'"]
    lines += [card.kind.command.format(to=to)] if card.kind else []
    lines += ["```", "", "On a model of your own that has the base's weights:", "", "```python"]
    lines += ["import lora_lightning as ll", "", f'll.load_adapter(model, "{to}")', "```"]
    if BASE_FILE in card.files:
        lines += ["", f"The base's weights were random ones, and lie in `{BASE_FILE}` beside the adapter."]
    if card.saved.foreign:
        place = card.to.removeprefix("hf:") if card.to.startswith("hf:") else "FOLDER"
        lines += ["", "The files are in PEFT's format, too:", "", "```python", "import peft", ""]
        lines += [f'model = peft.PeftModel.from_pretrained(base, "{place}")', "```"]
    lines += ["", "Loading compares the base's weights with the fingerprint, and refuses others."]
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *[[_cell(c) for c in row] for row in rows]]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str) -> str:
    """A text that stays one cell of a table, and is neither HTML, a link, nor anything else of Markdown's."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(text.split()))


def _counted(count: int, units: str) -> str:
    return f"{count:,} {units if count != 1 else units[:-1]}"


def _section(origin: Origin, name: str) -> Mapping[str, Any]:
    node = origin.config.get(name)
    return node if isinstance(node, Mapping) else {}


def _last(target: Any) -> str:
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _interval(bounds: Any) -> Sequence[float] | None:
    fine = (
        isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(_number(b) is not None for b in bounds)
    )
    return bounds if fine else None
