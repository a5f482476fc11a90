"""docs/troubleshooting.md: every message of ours, by what one was doing.

`python tests/docs/troubleshooting.py` writes it anew; what stands there before the mark is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from messages import Message, Reader, tidy

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
MARK = "<!-- From here on written by tests/docs/troubleshooting.py -->"
GROUPS = {  # what one was doing -> the beginnings of modules' names; the longest that fits counts
    "Installing": "utils.libraries",
    "Typing a command or an option": "app utils data.options",
    "Choosing layers, ranks and heads": "config planning utils.peft_names utils.pattern_kinds layers.foreign",
    "Adapting a model, selecting, combining and merging adapters": "adapters layers kernels methods",
    "Training": "trainer tasks.optim tasks.schedules methods.optimizers methods.scaled_adamw app.methods",
    "Resuming, tuning and searching": (
        "app.resume app.foreign app.tune app.trial app.search trainer.exact_resume"
    ),
    "Reading and writing adapters and checkpoints": (
        "files trainer.checkpoint trainer.state_dict utils.torch_file utils.mapping_file utils.atomic "
        "utils.writers utils.digests app.rebuild app.inspect app.shrink app.extract app.push app.upload"
    ),
    "Getting a pretrained model": "models utils.download",
    "Reading data": "data",
    "Scoring, predicting and transcribing": "tasks app.predict app.evaluat app.transcribe app.recognizer",
    "Making the page of a run": "report app.report",
}
FINDINGS = "What a check of data finds"


def group_of(module: str) -> str:
    """What one was doing whose error comes from this module; of a room that no group knows, the last one."""
    starts = [(start, name) for name, text in GROUPS.items() for start in text.split()]
    fits = [(len(start), name) for start, name in starts if module.startswith(start)]
    return max(fits)[1] if fits else "Other"


def written(reader: Reader) -> str:
    """The page as it should stand."""
    raised = [m for _, _, messages in reader.raised() for m in messages]
    texts: dict[str, dict[str, None]] = {}  # by module, each once, where it was met first
    seen: set[str] = set()
    for message in [*raised, *reader.gathered()]:
        text = tidy(message.text)
        if text and text not in seen:
            seen.add(text)
            texts.setdefault(message.module, {})[text] = None
    parts = [PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK]
    for group in [*GROUPS, "Other"]:
        modules = sorted(m for m in texts if group_of(m) == group)
        parts += [f"## {group}"] if modules else []
        for module in modules:
            parts += [f"**{_topic(reader, module)}**", "\n".join(f"- {_quoted(t)}" for t in texts[module])]
    parts += [f"## {FINDINGS}", _findings(reader.findings())]
    return "\n\n".join(parts) + "\n"


def _topic(reader: Reader, module: str) -> str:
    return reader.sources[module].topic.replace("*", "\\*")


def _quoted(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _findings(found: Iterable[Message]) -> str:
    rows = {tuple(tidy(part) or part for part in m.text.split(" | ")) for m in found}
    named = sorted((what, remedy) for what, remedy in rows if tidy(what) and "None" not in what)
    lines = [f"| {what.replace('<', '‹').replace('>', '›')} | {_told(remedy)} |" for what, remedy in named]
    return "\n".join(["| found | what `data.strict=false` does |", "| --- | --- |", *lines])


def _told(remedy: str) -> str:
    return "…" if "<" in remedy else remedy


if __name__ == "__main__":
    PAGE.write_text(written(Reader.of_package()), encoding="utf-8")
