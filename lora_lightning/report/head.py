"""The head of the page of a run: what was adapted to what, the number that matters, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.report.left import LeftRun, is_number, listing, mapping
from lora_lightning.report.page import Html, Section, table, text

LONG = 2000  # characters of a command line or a sentence
UNFINISHED = (
    "This run has not ended: there are no results yet, and what follows is what it has left so far. "
    "It goes on with resume=FOLDER; `lora-lightning report FOLDER` makes this page again."
)

UNTRAINED = "Nothing was trained: this is the base model as it is."


def title_of(run: LeftRun) -> str:
    """`vit_digits: LoRA`; of one adapter of several, its name too."""
    recipe = str(run.facts.get("recipe") or run.folder.absolute().name)
    words = [run.facts.get("adapter"), None if run.adapters else run.labels()[run.method]]
    return f"{recipe}: {', '.join(str(w) for w in words if w)}" if any(words) else recipe


def head(run: LeftRun) -> str:
    """Between the title and the first section, as HTML."""
    parts = [f"<p>{text(run.facts['about'], LONG)}.</p>" if run.facts.get("about") else ""]
    if not run.ended:
        parts.append(f'<p class="notice" role="status">{text(UNFINISHED, LONG)}</p>')
    if run.method == "none" and not run.adapters:
        parts.append(f'<p class="soft">{text(UNTRAINED, LONG)}</p>')
    parts += [number(run), _facts(run)]
    if command := run.facts.get("command"):
        parts.append(f"<pre><code>{text(command, LONG)}</code></pre>")
    return "\n".join(filter(None, parts))


def number(run: LeftRun) -> str:
    """The score that counts most, before and after, each with its interval."""
    if run.main is None or not run.result:
        return ""
    if run.method == "none" or run.main.name not in run.before.get("scores", {}):
        shown = [_value(run, run.result, "now", "the base" if run.method == "none" else "")]
    else:
        was, is_now = _value(run, run.before, "then", "before"), _value(run, run.result, "now", "after")
        shown = [was, "<span>→</span>", is_now]
    return f'<p class="headline">test {text(run.main.plain)}: {" ".join(shown)}</p>'


def _value(run: LeftRun, result: Mapping[str, Any], state: str, words: str = "") -> str:
    assert run.main is not None  # of whom there is a value
    value = run.main.number(result["scores"].get(run.main.name))
    bounds = run.main.interval(result["intervals"].get(run.main.name))
    told = f"{words} {f'({bounds})' * bool(bounds)}".strip()
    return f'<span class="{state}"><b>{value}{run.main.unit}</b> <small>{text(told)}</small></span>'


def _facts(run: LeftRun) -> str:
    """What, by what, on what, in a table of two columns."""
    facts, result = run.facts, run.result
    model, data = facts.get("model"), facts.get("data")
    adapted = run.method != "none"
    rows: dict[str, Any] = {
        "adapted": f"{model}, by {run.labels()[run.method]}{_rank(run)}" if model and adapted else None,
        "tested": None if adapted else model,
        "to" if adapted else "on": None if run.adapters else data,
        "adapters": ", ".join(run.adapters),
        "trained": _trained(result or facts),
        "checkpoint": _megabytes(result.get("checkpoint_bytes")),
        "time": _time(result.get("seconds"), facts.get("seconds")),
        "device": facts.get("device"),
        "versions": ", ".join(f"{k} {v}" for k, v in mapping(facts.get("versions")).items()),
        "begun": facts.get("started"),
        "seed": run.config.get("seed"),
        "run": run.folder.absolute().name,
    }
    cells = (
        f'<tr role="row"><th scope="row">{name}</th><td role="cell">{text(value, LONG)}</td></tr>'
        for name, value in rows.items()
        if value not in (None, "")
    )
    return f'<div class="wide"><table class="facts" role="table">{"".join(cells)}</table></div>'


def _rank(run: LeftRun) -> str:
    lora = run.config.get("lora")
    ranked = run.method in ("lora", "peft") and isinstance(lora, dict)
    return f", rank {lora.get('rank')}" if ranked and isinstance(lora, dict) else ""


def _trained(counts: Mapping[str, Any]) -> str:
    trained, total = counts.get("trained", 0), counts.get("total", 0)
    if not (is_number(trained) and is_number(total) and total > 0):
        return ""
    return f"{trained:,} of {total:,} parameters ({100 * trained / total:.3g} %)"


def _megabytes(size: Any) -> str:
    return f"{size / 1e6:.2f} MB" if is_number(size) else ""


def _time(training: Any, whole: Any) -> str:
    told = ((training, "of training"), (whole, "in all"))
    return ", ".join(f"{duration(seconds)} {what}" for seconds, what in told if is_number(seconds))


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def methods(run: LeftRun) -> list[Section]:
    """The final table, where several methods were compared or the base was tested too."""
    shown = mapping(run.facts.get("table"))
    header, rows = listing(shown.get("header")), listing(shown.get("rows"))
    rows = [row for row in rows if isinstance(row, list) and len(row) == len(header)]
    if not run.ended or len(run.results) < 2 or not rows:
        return []
    own = run.labels()[run.method]
    cells = [
        [Html(f"<b>{text(c)}</b>") if r and r[0] == own else c for c in r]
        for r in rows
        if isinstance(r, list)
    ]
    return [Section("Methods", table(header, cells))]


def adapted(run: LeftRun) -> list[Section]:
    """Which layers have updates, folded away since it may be long."""
    plan = mapping(run.facts.get("plan"))
    rows: Sequence[Sequence[Any]] = [row for row in listing(plan.get("rows")) if isinstance(row, list)]
    notes = "".join(f"<p>{text(line, LONG)}</p>" for line in listing(plan.get("notes")))
    whole = table(("layers", "count", "weight", "rank", "parameters"), rows) if rows else ""
    return [Section("What trains", whole + notes)] if whole or notes else []
