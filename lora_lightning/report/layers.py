"""What an adapter's updates have become, layer by layer: which changed most, effective ranks, spectra."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_lightning.report.charts import chart
from lora_lightning.report.curves import colours, key_of
from lora_lightning.report.left import is_number
from lora_lightning.report.metrics import Metrics
from lora_lightning.report.page import Section

EFFECTIVE = "lora/effective_rank/"
SHOWN = 120  # layers with a row or a line
MOST = 40  # layers with bars: those that changed most
WIDEST = 60  # columns of a heat map
ROW = 15  # pixels of a layer
NAME = 34  # characters of a layer's name, the last ones
WEIGHT, HEAD, NORM_OR_BIAS = "weight", "head", "norm or bias"  # kinds of what changes
SHADES = {"type": "linear", "range": [0.06, 0.95]}


def layers(updates: Sequence[Mapping[str, Any]], metrics: Metrics) -> list[Section]:
    """Sections of what changed in a run, and of its updates, if it has any.

    Args:
        updates: as `report/updates.json` has them: name, kind, norm and relative of what changed, and of an
            update rank, effective_rank and values, its singular values.
        metrics: of the run, in which effective ranks may stand by layer and epoch.
    """
    changed = [u for u in updates if isinstance(u.get("name"), str) and is_number(u.get("norm"))]
    known = [u for u in changed if _is_update(u)]
    shown = _most(known)
    note = f'<p class="soft">The {SHOWN} of {len(known)} layers that changed most.</p>' * (len(known) > SHOWN)
    ranks = _over_time(metrics, {u["name"] for u in shown}) + _used(shown)
    parts = [
        ("What changed most", _changed(changed)),
        ("Effective ranks", ranks and note + ranks),
        ("Spectra of the updates", _spectra(shown)),
    ]
    return [Section(title, html) for title, html in parts if html]


def _most(updates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many as a chart can hold, those that changed most, in the model's order."""
    kept = sorted(updates, key=lambda u: -(u.get("relative") or 0))[:SHOWN]
    names = {u["name"] for u in kept}
    return [u for u in updates if u["name"] in names]


def compared_ranks(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """The effective ranks of several runs' updates, layer by layer, where two of them have updates.

    Args:
        runs: `report/updates.json` of each, by its name.
    """
    known = {name: [u for u in updates if _is_update(u)] for name, updates in runs.items()}
    rows = [
        {"layer": u["name"], "run": name, "effective rank": u["effective_rank"], "rank": u["rank"]}
        for name, updates in known.items()
        for u in updates
    ]
    if sum(map(bool, known.values())) < 2:
        return []
    names = list(dict.fromkeys(row["layer"] for row in rows))
    spec = {
        "height": {"step": ROW},
        "data": {"values": rows},
        "mark": {
            "type": "point",
            "filled": True,
            "size": 45,
            "opacity": 0.85,
            "tooltip": {"content": "data"},
        },
        "encoding": {
            "y": _layers_axis(names),
            "x": {"field": "effective rank", "type": "quantitative", "scale": {"zero": False}},
            "color": {"field": "run", "legend": None, "scale": colours(list(runs))},
        },
    }
    note = '<p class="soft">How many directions each update uses at the tested epoch.</p>'
    drawn = chart(spec, "effective rank of each layer's update, by run", least=300, widest=900)
    return [Section("Effective ranks", note + key_of({name: bool(known[name]) for name in runs}) + drawn)]


def _is_update(update: Mapping[str, Any]) -> bool:
    values = update.get("values")
    return (
        isinstance(update.get("name"), str)
        and is_number(update.get("rank"))
        and is_number(update.get("effective_rank"))
        and isinstance(values, list)
        and all(map(is_number, values))
    )


def _changed(updates: Sequence[Mapping[str, Any]]) -> str:
    """The size of each change beside its weight's, the largest first: weights, and by themselves what is
    small or begins near nothing, so that its changes are far greater."""
    known = [u for u in updates if is_number(u.get("relative"))]
    weights = [u for u in known if u.get("kind") == WEIGHT]
    others = [u for u in known if u.get("kind") != WEIGHT]
    title = (
        "<h3>Heads, norms and biases</h3>" if any(u.get("kind") != HEAD for u in others) else "<h3>Heads</h3>"
    )
    return _bars(weights) + (title + _bars(others) if others else "")


def _bars(known: Sequence[Mapping[str, Any]]) -> str:
    if not known:
        return ""
    ordered = sorted(known, key=lambda u: -u["relative"])[:MOST]
    rows = [
        {"layer": u["name"], "change %": 100 * u["relative"], "norm of the change": u["norm"]}
        for u in ordered
    ]
    spec = {
        "height": {"step": ROW},
        "data": {"values": rows},
        "mark": {"type": "bar", "tooltip": {"content": "data"}, "height": {"band": 0.7}},
        "encoding": {
            "y": _layers_axis([u["name"] for u in ordered]),
            "x": {
                "field": "change %",
                "type": "quantitative",
                "title": "size of the change, % of the weight",
            },
        },
    }
    first = f", the {MOST} of {len(known)} layers that changed most" if len(known) > MOST else ""
    note = f'<p class="soft">‖ΔW‖ / ‖W‖ of each layer at the tested epoch{first}.</p>'
    return note + chart(
        spec, f"size of each layer's change beside its weight, the largest first{first}", widest=900
    )


def _layers_axis(names: Sequence[str]) -> dict[str, Any]:
    """Layers from above, their names short in front, since their ends tell them apart."""
    short = f"length(datum.label) > {NAME} ? '…' + slice(datum.label, {1 - NAME}) : datum.label"
    axis = {"labelExpr": short, "labelLimit": 190, "ticks": False, "domain": False}
    return {"field": "layer", "type": "nominal", "title": None, "sort": list(names), "axis": axis}


def _over_time(metrics: Metrics, shown: Collection[str]) -> str:
    """A heat map of layers by epochs, of these layers, or of any where none are known."""
    found = {
        name.removeprefix(EFFECTIVE): points for name, points in metrics.items() if name.startswith(EFFECTIVE)
    }
    found = {name: points for name, points in found.items() if name in shown or not shown}
    epochs = sorted({p.epoch for points in found.values() for p in points if p.epoch >= 0})
    if not found or len(epochs) < 2:
        return ""
    columns = min(WIDEST, len(epochs))
    chosen = {epochs[round(i * (len(epochs) - 1) / (columns - 1))] for i in range(columns)}
    rows = [
        {"layer": name, "epoch": p.epoch + 1, "effective rank": p.value}
        for name, points in found.items()
        for p in {p.epoch: p for p in points}.values()
        if p.epoch in chosen
    ]
    return (
        '<p class="soft">How many directions each update uses, by epoch: the fuller the colour, the more.</p>'
        + _heat(
            rows, list(found), "epoch", "effective rank", "effective rank of each layer's update by epoch"
        )
    )


def _used(updates: Sequence[Mapping[str, Any]]) -> str:
    """A heat map of layers by singular values, each beside the layer's largest; and the effective rank."""
    rows = [
        {"layer": u["name"], "direction": i + 1, "share of the largest": v / u["values"][0],
         "singular value": v, "effective rank": u["effective_rank"], "rank": u["rank"]}
        for u in updates
        if u["values"] and u["values"][0] > 0
        for i, v in enumerate(u["values"][:WIDEST])
    ]  # fmt: skip
    if not rows:
        return ""
    names = [u["name"] for u in updates]
    note = (
        '<p class="soft">Each layer\'s directions at the tested epoch: the fuller the colour, the nearer the '
        "singular value to the layer's largest. The mark is the effective rank: a layer whose mark lies far "
        "to the left uses less rank than it has.</p>"
    )
    marks = {
        "transform": [{"filter": "datum.direction == 1"}],
        "mark": {
            "type": "tick",
            "orient": "vertical",
            "thickness": 3,
            "size": ROW - 4,
            "color": "var(--bad)",
        },
        "encoding": {
            "x": {"field": "effective rank", "type": "quantitative"},
            "tooltip": [{"field": "layer"}, {"field": "effective rank", "format": ".3~g"}, {"field": "rank"}],
        },
    }
    most = max(len(u["values"][:WIDEST]) for u in updates)
    squares = {
        "mark": {"type": "rect", "color": "var(--now)", "tooltip": {"content": "data"}},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "title": "direction",
                  "scale": {"domain": [0, most], "nice": False}, "axis": {"grid": False, "tickMinStep": 1}},
            "x2": {"field": "direction"},
            "opacity": {"field": "share of the largest", "type": "quantitative", "legend": None,
                        "scale": SHADES | {"domain": [0, 1]}},
        },
    }  # fmt: skip
    spec = {
        "height": {"step": ROW},
        "data": {"values": rows},
        "transform": [{"calculate": "datum.direction - 1", "as": "from"}],
        "encoding": {"y": _layers_axis(names)},
        "layer": [squares, marks],
    }
    return note + chart(
        spec, "singular values and effective rank of each layer's update", least=300, widest=900
    )


def _heat(rows: Sequence[Mapping[str, Any]], names: Sequence[str], x: str, value: str, label: str) -> str:
    least, most = min(row[value] for row in rows), max(row[value] for row in rows)
    spec = {
        "height": {"step": ROW},
        "data": {"values": list(rows)},
        "mark": {"type": "rect", "color": "var(--now)", "tooltip": {"content": "data"}},
        "encoding": {
            "y": _layers_axis(names),
            "x": {"field": x, "type": "ordinal", "title": x,
                  "axis": {"labelAngle": 0, "labelOverlap": True, "ticks": False, "domain": False}},
            "opacity": {"field": value, "type": "quantitative", "legend": None,
                        "scale": SHADES | {"domain": [least, max(most, least + 1e-9)]}},
        },
    }  # fmt: skip
    return (
        chart(spec, label, least=300, widest=900)
        + f'<p class="soft">From {least:.3g}, the palest, to {most:.3g}.</p>'
    )


def _spectra(updates: Sequence[Mapping[str, Any]]) -> str:
    """The singular values of every layer's update, a line each."""
    rows = [
        {"layer": u["name"], "direction": i + 1, "singular value": v}
        for u in updates
        for i, v in enumerate(u["values"])
    ]
    if not rows or max(row["singular value"] for row in rows) <= 0:
        return ""
    select = {
        "type": "point", "fields": ["layer"], "on": "pointerover, click", "nearest": True,
        "clear": "pointerout",
    }  # fmt: skip
    here = {"condition": {"param": "one", "empty": False, "value": 1}, "value": 0.35}
    points = {"type": "circle", "size": 20, "opacity": 0.35, "tooltip": {"content": "data"}}
    axis = {"tickMinStep": 1, "grid": False}
    spec = {
        "height": 240,
        "data": {"values": rows},
        "encoding": {
            "x": {"field": "direction", "type": "quantitative", "axis": axis, "scale": {"domainMin": 1}},
            "y": {"field": "singular value", "type": "quantitative"},
            "detail": {"field": "layer"},
        },
        "layer": [
            {"mark": points, "params": [{"name": "one", "select": select}]},
            {"mark": "line", "encoding": {"opacity": here}},
        ],
    }
    note = '<p class="soft">A line is a layer: its update\'s singular values, the largest first.</p>'
    return note + chart(spec, "singular values of each layer's update", widest=900)
