"""Curves of what was logged: a chart for each metric, a line for each method or run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.report.charts import chart
from lora_lightning.report.left import Shown
from lora_lightning.report.metrics import MOST, Metrics, Point, in_words, thinned
from lora_lightning.report.page import Section, text

COLOURS = 8  # of the page, --c1 to --c8
FEW = 40  # points of a curve, up to which each is marked
HEIGHT = 190  # pixels
DASHES = {"": [1, 0], "training": [1, 0], "validation": [5, 3]}
MEANS = {
    "lora/effective_rank": "effective rank, mean over the layers",
    "lora/stable_rank": "stable rank, mean over the layers",
    "lora/relative_norm": "size of the updates, % of their weights, mean over the layers",
}
NORMS = {
    "lora/grad_norm": "gradient of the updates (norm)",
    "train/gradient_norm": "gradient of all that trains (norm)",
    "lora/update_norm": "updates (norm)",
}
PERCENT = ("lora/relative_norm",)

Lines = Mapping[str, Mapping[str, Sequence[Point]]]  # by who it is of, then by the part: training, validation


def curves(metrics: Mapping[str, Metrics], scores: Sequence[Shown]) -> list[Section]:
    """Sections of the curves of a run and the methods that it is compared with, or of several runs.

    Args:
        metrics: by the words for whom they are of.
        scores: of the task.
    """
    names = list(dict.fromkeys(name for one in metrics.values() for name in one))
    losses = _losses(metrics, names)
    scored = _scores(metrics, names, scores)
    rates = _rates(metrics, [name for name in names if name.startswith("lr-")])
    norms = {name: label for name, label in (NORMS | MEANS).items() if name in names}
    parts: dict[str, tuple[tuple[str, ...], list[str]]] = {
        "Losses": (("",), losses),
        "Scores in validation": (("val/",), scored),
        "Learning rates": (("lr-",), rates),
        "Norms and ranks": (tuple(norms), [_alone(metrics, name, label) for name, label in norms.items()]),
    }
    return [
        Section(title, f'{_key(metrics, begin)}<div class="two">{"".join(charts)}</div>')
        for title, (begin, charts) in parts.items()
        if charts
    ]


def _key(metrics: Mapping[str, Metrics], begin: tuple[str, ...]) -> str:
    """Which colour stands for whom, of those with a metric that begins so; nothing where there is one."""
    whose = {who: any(name.startswith(begin) for name in one) for who, one in metrics.items()}
    return key_of(whose) if len(metrics) > 1 else ""


def key_of(names: Mapping[str, bool]) -> str:
    """Which colour stands for whom, as HTML, which breaks lines where a chart's own legend cannot.

    Args:
        names: in the order of the colours; those that are False have no line here.
    """
    marks = [
        f'<span><i style="background:var(--c{i % COLOURS + 1})"></i>{text(name)}</span>'
        for i, (name, is_there) in enumerate(names.items())
        if is_there
    ]
    return f'<p class="key">{" ".join(marks)}</p>'


def colours(names: Sequence[str]) -> dict[str, Any]:
    """A scale of Vega's that gives names their colours, in this order."""
    return {"domain": list(names), "range": [f"var(--c{i % COLOURS + 1})" for i in range(len(names))]}


def _losses(metrics: Mapping[str, Metrics], names: Sequence[str]) -> list[str]:
    """Each loss, in training and in validation; the sum first."""
    found = {n.partition("/")[2] for n in names if re.fullmatch(r"(train|val)/(.*_)?loss(_.*)?", n)}
    found |= {n.removeprefix("train/") for n in names if n.startswith("train/")} - {"gradient_norm"}
    charts = []
    for name in sorted(found, key=lambda n: (n != "loss", n)):
        lines = {
            who: {
                part: one[f"{stage}/{name}"]
                for part, stage in (("training", "train"), ("validation", "val"))
                if f"{stage}/{name}" in one
            }
            for who, one in metrics.items()
        }
        charts.append(_figure(lines, in_words(name), 1.0))
    return charts


def _scores(metrics: Mapping[str, Metrics], names: Sequence[str], scores: Sequence[Shown]) -> list[str]:
    """The task's scores in its order, in their units; then what else is logged in validation."""
    known = {f"val/{s.name}": s for s in scores}
    other = [n for n in names if n.startswith("val/") and n not in known and not re.search(r"(^|/|_)loss", n)]
    charts = []
    for name in [*(n for n in known if n in names), *other[: max(0, 6 - len(known))]]:
        shown = known.get(name)
        scale, label = (shown.scale, shown.label) if shown else _unlisted(name.removeprefix("val/"))
        lines = {who: {"": one.get(name, ())} for who, one in metrics.items()}
        charts.append(_figure(lines, label, scale))
    return charts


def _unlisted(name: str) -> tuple[float, str]:
    """From what was logged to what is shown, and the label, of what is no score of the task: fractions in
    percent, as its scores are."""
    if re.match(r"(mask_)?map(_|/|$)", name):
        return 100.0, in_words(name)
    share = re.match(r"(acc|f1|ece|wer|cer|top5|source|miou|iou)(_|/|$)", name)
    return (100.0, f"{in_words(name)} %") if share else (1.0, in_words(name))


def _rates(metrics: Mapping[str, Metrics], names: Sequence[str]) -> list[str]:
    """A chart for each group of parameters; groups that always had the same rate share one."""
    alike: dict[str, list[str]] = {}
    for name in names:
        values = [(who, p.step, p.value) for who, one in metrics.items() for p in one.get(name, ())]
        alike.setdefault(repr(values), []).append(name)
    return [_alone(metrics, same[0], ", ".join(map(_group, same))) for same in alike.values()]


def _alone(metrics: Mapping[str, Metrics], name: str, label: str) -> str:
    lines = {who: {"": one.get(name, ())} for who, one in metrics.items()}
    scale = 100.0 if name in PERCENT else 1.0
    return _figure(lines, label, scale)


def _group(name: str) -> str:
    """`lr-AdamW/head_no_decay` in words."""
    return name.removeprefix("lr-").partition("/")[2].replace("_", " ") or "all"


def _figure(lines: Lines, title: str, scale: float) -> str:
    """A chart under its title; whom each colour means is said above.

    Args:
        scale: from what was logged to what is shown.
    """
    order = list(lines)
    whole = {who: {part: points for part, points in of.items() if points} for who, of in lines.items()}
    series = {(who, part): points for who, of in whole.items() for part, points in of.items()}
    rows = [
        {"step": p.step, "epoch": p.epoch if p.epoch >= 0 else None, "line": _line(who, part),
         "value": scale * p.value, "of": who, "part": part}
        for (who, part), points in series.items()
        for p in thinned(points)
    ]  # fmt: skip
    parts = list(dict.fromkeys(part for _, part in series))
    longest = max(map(len, series.values()))
    spec = line_chart(rows, [_line(*key) for key in series], order, longest <= FEW)
    notes = [f"each point is the mean of {longest / MOST:.0f} values"] if longest > 2 * MOST else []
    notes += ["dashed: in validation"] if len(parts) > 1 else []
    note = f'<p class="soft">{"; ".join(notes)}</p>' if notes else ""
    label = f"{title} over the steps of the optimizer: {', '.join(_line(*key) for key in series)}"
    return f"<div><h3>{text(title, 200)}</h3>{note}{chart(spec, label)}</div>"


def _line(who: str, part: str) -> str:
    return f"{who}, {part}" if part else who


def line_chart(
    rows: Sequence[Mapping[str, Any]], lines: Sequence[str], order: Sequence[str], marked: bool
) -> dict[str, Any]:
    """Lines over steps, with a rule where one points and the values of all lines there.

    Args:
        rows: step, epoch, value; line, of and part, which say which line it is.
        lines: their names.
        order: whom lines may be of, by the colours.
        marked: each point is.
    """
    axis = {"tickMinStep": 1, "tickCount": 6, "grid": False, "format": "d"}
    level = _level([row["value"] for row in rows])
    encoding: dict[str, Any] = {
        "x": {"field": "step", "type": "quantitative", "title": "step", "axis": axis},
        "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}} | level,
    }  # fmt: skip
    dashes = {"domain": list(DASHES), "range": list(DASHES.values())}
    drawn: dict[str, Any] = {
        "detail": {"field": "line"},
        "color": {"field": "of", "scale": colours(order), "legend": None},
        "strokeDash": {"field": "part", "scale": dashes, "legend": None},
    }
    told = [
        {"field": _escaped(name), "type": "quantitative", "title": name, "format": ".4~g"} for name in lines
    ]
    select = {
        "type": "point",
        "fields": ["step"],
        "nearest": True,
        "on": "pointermove, click",
        "clear": "pointerout",
    }
    here = {"condition": {"param": "here", "empty": False, "value": 0.5}, "value": 0}
    return {
        "height": HEIGHT,
        "data": {"values": list(rows)},
        "encoding": encoding,
        "layer": [
            {"mark": {"type": "line", "point": {"size": 18} if marked else False}, "encoding": drawn},
            {
                "transform": [{"pivot": "line", "value": "value", "groupby": ["step", "epoch"]}],
                "params": [{"name": "here", "select": select}],
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {
                    "y": None,
                    "opacity": here,
                    "tooltip": [{"field": "step", "type": "quantitative"}, *told],
                },
            },
        ],
    }


def _level(values: Sequence[float]) -> dict[str, Any]:
    """The axis of values that are nearly the same, of which Vega would write every digit: a level line."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    middle, far = (low + high) / 2, max(abs(low), abs(high))
    if high - low > 1e-3 * far:
        return {}
    room = 0.05 * far or 1.0
    axis = {"format": ".4~g", "tickCount": 3}
    return {"axis": axis, "scale": {"domain": [middle - room, middle + room], "nice": False}}


def _escaped(name: str) -> str:
    """A text as the name of one field, which Vega would read as a path."""
    return re.sub(r"([.\[\]\\'\"])", r"\\\1", name)
