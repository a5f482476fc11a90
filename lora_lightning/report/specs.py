"""Vega-Lite specifications of charts that pages of several tasks have: what `charts.chart` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WRITTEN = 16  # classes up to which each cell of a matrix shows its number
POINTS = 1500  # of a scatter
Spec = dict[str, Any]
Row = Mapping[str, Any]
STATES = {"before": "var(--then)", "after": "var(--now)", "base": "var(--now)"}  # of a model, their colours


def apart(names: Sequence[str]) -> list[str]:
    """Names, of which no two are alike: a second `cat` is `cat (2)`."""
    found: dict[str, None] = {}
    for name in names:
        number, one = 1, name
        while one in found:
            number += 1
            one = f"{name} ({number})"
        found[one] = None
    return list(found)


def bars(
    rows: Sequence[Row], name: str, value: str, top: float | None = 100, title: str | None = None
) -> Spec:
    """A horizontal bar a row, with its interval as a line and a mark where it was before.

    Args:
        rows: `name` and `value`, and `low`, `high` and `before` where there are any, or None.
        name, value: names of columns, in which Vega-Lite takes dots and brackets for paths.
        top: where the axis ends; None is where the data do.
        title: of the axis; None is `value`.
    """
    scale = {"domain": [0, top]} if top else {"zero": True}
    across = {"type": "quantitative", "scale": scale, "axis": {"title": title or value, "tickCount": 5}}
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "height": {"band": 0.65}, "opacity": 0.8},
            "encoding": {"x": {"field": value, **across}},
        }
    ]
    if any(row.get("low") is not None for row in rows):
        ends = {"x": {"field": "low", **across}, "x2": {"field": "high"}}
        layers.append({"mark": {"type": "rule", "color": "var(--ink)", "strokeWidth": 1.5}, "encoding": ends})
    if any(row.get("before") is not None for row in rows):
        mark = {"type": "tick", "color": "var(--bad)", "thickness": 3, "size": 16}
        layers.append({"mark": mark, "encoding": {"x": {"field": "before", **across}}})
    tooltip = [
        {"field": name, "type": "nominal"},
        *({"field": field, "type": "quantitative", "format": ".3~f"} for field in _numbers(rows, name)),
    ]
    return {
        "data": {"values": list(rows)},
        "height": 20 * len(rows),
        "encoding": {
            "y": {"field": name, "type": "nominal", "title": None, "scale": _domain(rows, name)},
            "tooltip": tooltip,
        },
        "layer": layers,
    }


def _domain(rows: Sequence[Row], name: str) -> Spec:
    """In the order of the rows; also those without a value."""
    return {"domain": list(dict.fromkeys(row[name] for row in rows))}


def _numbers(rows: Sequence[Row], *others: str) -> list[str]:
    """The columns of numbers, in their order."""
    names = dict.fromkeys(key for row in rows for key in row)
    return [n for n in names if n not in others and any(row.get(n) is not None for row in rows)]


def grouped(rows: Sequence[Row], name: str, state: str, value: str, states: Mapping[str, str]) -> Spec:
    """Points with their intervals, a line a name and state, the states of a name one under the other.

    Args:
        rows: `name`, `state`, `value`, `low` and `high`; names of columns as of `bars`.
        states: colours of the states, in their order.
    """
    colour = {
        "field": state,
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(states), "range": list(states.values())},
        "legend": {"columns": 2},  # of which a telephone has room
    }
    across = {"type": "quantitative", "scale": {"zero": True}, "axis": {"title": value, "tickCount": 5}}
    shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
    shape = {
        **colour,
        "scale": {"domain": list(states), "range": [shapes[i % len(shapes)] for i in range(len(states))]},
    }
    point = {"x": {"field": value, **across}, "shape": shape}
    ends = {"x": {"field": "low", **across}, "x2": {"field": "high"}}
    return {
        "data": {"values": list(rows)},
        "height": 10 + (8 + 14 * len(states)) * len(_domain(rows, name)["domain"]),
        "encoding": {
            "y": {
                "field": name, "type": "nominal", "title": None,
                "scale": {**_domain(rows, name), "paddingInner": 0.3},
            },
            "yOffset": {"field": state, "type": "nominal", "sort": list(states)},
            "color": colour,
            "tooltip": [
                {"field": name, "type": "nominal"},
                {"field": state, "type": "nominal"},
                *({"field": f, "type": "quantitative", "format": ".1f"} for f in (value, "low", "high")),
            ],
        },
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": ends},
            {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": point},
        ],
    }  # fmt: skip


def confusion(counts: np.ndarray, names: Sequence[str], what: str = "pictures") -> Spec:
    """A confusion matrix: a row a true class, a column a predicted one, shaded by the share of the row.

    Args:
        counts: (classes, classes).
        what: is counted; each cell shows how many, of pixels the percent of the row.
    """
    shares = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    cells = [
        {"true": names[i], "predicted": names[j], what: int(counts[i, j]), "% of the true": shares[i, j]}
        for i, j in zip(*np.nonzero(counts), strict=True)
    ]
    small = len(names) <= WRITTEN
    axis = {"labelLimit": 100, "ticks": False, "domain": False}
    order = {"type": "nominal", "scale": {"domain": list(names), "padding": 0.04}}
    share = {"field": "% of the true", "type": "quantitative"}
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "color": "var(--now)"},
            "encoding": {
                "opacity": {**share, "legend": None, "scale": {"domain": [0, 100], "range": [0.06, 0.95]}}
            },
        }
    ]
    if small:
        ink = {
            "condition": {"test": "datum['% of the true'] > 55", "value": "var(--ground)"},
            "value": "var(--ink)",
        }
        mark = {"type": "text", "fontSize": 9}
        number = {**share, "format": ".0f"} if what == "pixels" else {"field": what}
        layers.append({"mark": mark, "encoding": {"text": number, "color": ink}})
    return {
        "data": {"values": cells},
        "width": {"step": 26 if small else 14},
        "height": {"step": 26 if small else 14},
        "encoding": {
            "x": {"field": "predicted", **order, "axis": {**axis, "orient": "top", "labelAngle": -60}},
            "y": {"field": "true", **order, "axis": axis},
            "tooltip": [
                {"field": "true"},
                {"field": "predicted"},
                {"field": what, "type": "quantitative", "format": ","},
                {**share, "format": ".1f"},
            ],
        },
        "layer": layers,
    }


def reliability(states: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Spec:
    """How often a prediction is right, by how sure the model is of it, points by how many there are.

    Args:
        states: of each, (bins,), the share that is right, the mean confidence, and how many there are.
    """
    rows = [
        {"state": state, "sure %": 100 * sure[i], "right %": 100 * right[i], "predictions": int(counts[i])}
        for state, (right, sure, counts) in states.items()
        for i in range(len(counts))
        if counts[i] > 0
    ]
    colours = dict(zip(states, ("var(--now)", "var(--c2)"), strict=False))
    fields = {
        "x": _percent("sure %", "sure, %"),
        "y": _percent("right %", "right, %"),
        "color": _states("state", colours),
    }
    sizes = {"legend": None, "scale": {"range": [15, 300]}}
    shapes = {"domain": list(colours), "range": ["circle", "diamond"][: len(colours)]}
    point = {
        "size": {"field": "predictions", "type": "quantitative", **sizes},
        "shape": {**_states("state", colours), "scale": shapes},
        "tooltip": [
            {"field": "state"},
            *({"field": f, "type": "quantitative", "format": ".1f"} for f in ("sure %", "right %")),
            {"field": "predictions", "type": "quantitative"},
        ],
    }  # fmt: skip
    return {
        "data": {"values": rows},
        "height": 280,
        "layer": [
            {"encoding": fields, "layer": [
                {"mark": {"type": "line", "strokeWidth": 1, "opacity": 0.5}},
                {"mark": {"type": "point", "filled": True, "opacity": 0.9}, "encoding": point},
            ]},
            _diagonal(0, 100),
        ],
    }  # fmt: skip


def scatter(truths: np.ndarray, states: Mapping[str, np.ndarray]) -> Spec:
    """Predicted numbers over true ones, at most 1,500 of each state, evenly chosen.

    Args:
        states: numbers of each state, drawn in this order.
    """
    chosen = np.linspace(0, len(truths) - 1, min(POINTS, len(truths))).round().astype(int)
    rows = [
        {"true": float(truths[i]), "predicted": float(values[i]), "state": state}
        for state, values in states.items()
        for i in chosen
    ]
    last = list(states.values())[-1]
    low, high = float(min(truths.min(), last.min())), float(max(truths.max(), last.max()))
    axis = {
        "type": "quantitative",
        "scale": {"domain": [low, high if high > low else low + 1], "clamp": True},
    }
    return {
        "data": {"values": rows},
        "height": 320,
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "size": 18, "opacity": 0.7},
                "encoding": {
                    "x": {"field": "true", **axis},
                    "y": {"field": "predicted", **axis},
                    "color": _states("state", {s: STATES.get(s, "var(--now)") for s in states}),
                    "tooltip": [
                        {"field": field, "type": "quantitative", "format": ".4~g"}
                        for field in ("true", "predicted")
                    ],
                },
            },
            _diagonal(low, high),
        ],
    }  # fmt: skip


def curves(rows: Sequence[Row], across: str, up: str, states: Mapping[str, str], height: int = 170) -> Spec:
    """A line a state over shares in percent.

    Args:
        rows: `across`, `up` and `state`, in order.
        states: colours.
    """
    shown = _states("state", states)
    dashes = [[1, 0] if i + 1 == len(states) else [5, 3] for i in range(len(states))]
    return {
        "data": {"values": list(rows)},
        "height": height,
        "mark": {"type": "line", "interpolate": "step-before", "strokeWidth": 2},
        "encoding": {
            "x": _percent(across, across),
            "y": _percent(up, up),
            "order": {"field": across, "type": "quantitative"},
            "color": shown,
            "strokeDash": {**shown, "scale": {"domain": list(states), "range": dashes}},
            "tooltip": [
                {"field": "state"},
                *({"field": f, "type": "quantitative", "format": ".1f"} for f in (across, up)),
            ],
        },
    }  # fmt: skip


def _percent(field: str, title: str) -> Spec:
    return {
        "field": field,
        "type": "quantitative",
        "scale": {"domain": [0, 100]},
        "axis": {"title": title, "tickCount": 5},
    }


def _states(field: str, colours: Mapping[str, str]) -> Spec:
    """The colours of states; a key to them where there are several."""
    scale = {"domain": list(colours), "range": list(colours.values())}
    shown: Spec = {"field": field, "type": "nominal", "title": None, "scale": scale}
    return shown if len(colours) > 1 else {**shown, "legend": None}


def _diagonal(low: float, high: float) -> Spec:
    """Where the two axes are equal."""
    ends = {field: {"datum": end, "type": "quantitative"} for field, end in
            (("x", low), ("y", low), ("x2", high), ("y2", high))}  # fmt: skip
    for field in ("x2", "y2"):
        del ends[field]["type"]
    mark = {"type": "rule", "color": "var(--soft)", "strokeDash": [4, 3]}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": ends}
