"""README.md of an exported model: its base and licence, what goes in and comes out, how it is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.utils.tables import printable

CARD = "README.md"


@dataclass(frozen=True)
class ExportCard:
    """What a card tells beside the file itself.

    Attributes:
        title: a name.
        summary: what the model is for, in a sentence.
        facts: rows of a table: base, licence, data.
        results: header and rows of a table of scores; empty where none are known.
        loading: lines of Python that load plain weights; empty where nobody has said.
    """

    title: str = "A model"
    summary: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    results: tuple[tuple[str, ...], ...] = ()
    loading: str = ""


def card_of(about: ExportCard, facts: Mapping[str, Any], title: str, runs: str) -> str:
    """The whole card.

    Args:
        facts: of export.json.
        title: of the format.
        runs: what `run.py` needs; empty where there is none.
    """
    lines = [f"# {cell(about.title)}", ""]
    if about.summary:
        lines += [about.summary, ""]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    whole = f", int8 ({facts['quantize']})" if facts["quantize"] else ""
    rows = [
        *about.facts,
        ("format", f"{title}{whole}, {facts['file']}, {facts['bytes']:,} bytes"),
        ("largest difference", _difference(facts)),
        ("made with", versions),
    ]
    lines += table(("", ""), [(name, value) for name, value in rows if value])
    if about.results:
        lines += ["", "## Results", "", "On the test data; intervals are of 95 %.", ""]
        lines += table(about.results[0], about.results[1:])
    if facts["inputs"]:
        lines += ["", "## Inputs and outputs", ""]
        sizes = [(i["name"], i["dtype"], " × ".join(map(str, i["shape"]))) for i in facts["inputs"]]
        lines += table(("input", "type", "size"), sizes)
        come = "comes" if len(facts["outputs"]) == 1 else "come"
        lines += ["", f"Out {come} {cell(', '.join(facts['outputs']))}{_said(facts)}."]
    lines += ["", "## Use", "", *_use(about, facts, runs)]
    return printable("\n".join(lines)) + "\n"


def _difference(facts: Mapping[str, Any]) -> str:
    if not facts["inputs"]:
        return ""
    which = "inputs of the calibration" if facts["quantize"] == "static" else "fresh inputs"
    return f"{facts['difference']:.1e} of the output's scale from the model, on {which}"


def _said(facts: Mapping[str, Any]) -> str:
    return f": {facts['means']}" if facts["means"] else ""


def _use(about: ExportCard, facts: Mapping[str, Any], runs: str) -> list[str]:
    if not runs:
        load = about.loading or (
            f"model.load_state_dict(load_file({facts['file']!r}))  # a {facts['network']}, built as it was"
        )
        head = ["from safetensors.torch import load_file", ""] if "load_file" in load else []
        return ["```python", *head, *load.splitlines(), "```"]
    lines = ["```", f"pip install {runs} numpy", "python run.py  # on example.npz", "```"]
    if "preprocess.json" in facts["files"]:
        lines += ["", "`preprocess.json` says what is done to an input before."]
        if facts["inside"]:
            lines[-1] += " Mean and deviation are a part of the file, which takes bytes."
    if "names.json" in facts["files"]:
        lines += ["", "`names.json` says what the outputs are called."]
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown, whatever its cells hold."""
    lines = [header, ["---"] * len(header), *[[cell(c) for c in row] for row in rows]]
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(text: str) -> str:
    """A text that stays one cell of a table, and is neither HTML, a link, nor anything else of Markdown's."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(text.split()))
