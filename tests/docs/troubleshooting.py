"""docs/troubleshooting.md: every message of ours, its cause and its remedy, by what one was doing.

`python tests/docs/troubleshooting.py` writes it anew; what stands there before the mark is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from messages import Message, Reader, tidy
from remedies import taken_apart

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
MARK = "<!-- From here on written by tests/docs/troubleshooting.py -->"
GROUPS = {  # what one was doing -> the beginnings of modules' names; the longest that fits counts
    "Installing": "utils.libraries",
    "Typing a command or an option": "app utils data.options",
    "Resuming, tuning and searching": (
        "app.resume app.foreign app.tune app.trial app.search trainer.exact_resume"
    ),
    "Choosing layers, ranks and heads": "config planning utils.peft_names utils.pattern_kinds layers.foreign",
    "Adapting a model, selecting and merging adapters": "adapters layers kernels",
    "Several adapters in one: combined, mixed": "adapters.combine adapters.mix",
    "Ranks and beginnings that data decide": (
        "adapters.by_data adapters.measure methods.shortening methods.inits methods.moments trainer.measuring"
    ),
    "Training": "trainer tasks.optim tasks.schedules methods app.methods utils.sharding",
    "Reading and writing adapters and checkpoints": (
        "files trainer.checkpoint trainer.state_dict utils.torch_file utils.mapping_file utils.atomic "
        "utils.writers utils.digests app.rebuild app.inspect app.shrink app.extract"
    ),
    "Adapters of PEFT": "files.peft",
    "Publishing and fetching": "files.hubs app.push app.upload utils.download",
    "Getting a pretrained model": "models",
    "Reading pictures": "data",
    "Reading pictures from shards": "data.stream",
    "Reading boxes and masks": "data.coco data.voc data.pennfudan data.detection data.mask",
    "Reading recordings": "data.audio data.manifests data.recordings data.corpora data.accents data.speech",
    "Scoring, predicting and transcribing": "tasks app.predict app.evaluat app.transcribe app.recognizer",
    "Making the page of a run": "report app.report",
    "Compressing": "compression app.compress",
    "Exporting": "exporting app.export",
    "Serving": "serving app.serve",
}
WITHIN = {  # of reasons that are named within a message: their module or beginning -> words of the message
    "adapters.tuned_twin": "is not a fine-tuned",
    "app.foreign": "is not run unasked",
    "compression.layers": "no layer can be compressed",
    "compression.rebuild": "the description does not fit",
    "compression.recurrent_readers": "no layer can be compressed",
    "compression.recurrent_stacks": "the description does not fit",
    "data.decoding": "cannot be read as a picture",
    "data.named_folders": "is not on this machine",
    "data.speech_check": "utterances cannot be used",
    "data.stream_sources": "files are not there",
    "data.stream_tar": "cannot be trained on as they are",
    "files.compatibility": "does not fit this model",
    "files.merge": "does not fit the base's weights",
    "files.peft_read": "the PEFT adapter in",
    "files.save_load": "does not fit this model",
    "files.weights": "nothing was loaded",
    "layers.registry": "which cannot be adapted",
    "the update holds NaN": "No layer was merged",
    "trainer.collapse": "the training has collapsed",
}
FINDINGS = "What a check of data finds"


def group_of(module: str) -> str:
    """What one was doing whose error comes from this module; of a room that no group knows, the last one."""
    starts = [(start, name) for name, text in GROUPS.items() for start in text.split()]
    fits = [(len(start), name) for start, name in starts if module.startswith(start)]
    return max(fits)[1] if fits else "Other"


def messages_of(reader: Reader) -> list[Message]:
    """Each text once, on one line, as it is raised where it is raised by itself."""
    raised = [m for _, _, messages in reader.raised() for m in messages]
    found: dict[str, Message] = {}
    for message in [*raised, *reader.gathered()]:
        text = tidy(message.text)
        if text and (text not in found or message.whole > found[text].whole):
            found[text] = Message(message.module, text, message.whole)
    return [m for text, m in found.items() if "None" not in text or text.replace("None", "…") not in found]


def rows(messages: Iterable[Message]) -> Iterator[tuple[str, str, str]]:
    """Group, cause and remedy of each message; of a reason that is named within another one, that one's
    remedy. Where there is none, the remedy is ""."""
    messages = list(messages)
    for message in messages:
        cause, remedy = taken_apart(message.text)
        if not remedy and (around := _around(message)):
            outer = next((m.text for m in messages if around in m.text and taken_apart(m.text)[1]), "")
            cause, remedy = f"… {cause}", taken_apart(outer)[1]
        yield group_of(message.module), cause, remedy


def _around(message: Message) -> str:
    by_words = next((words for start, words in WITHIN.items() if message.text.startswith(start)), "")
    return by_words or ("" if message.whole else WITHIN.get(message.module, ""))


def written(reader: Reader) -> str:
    """The page as it should stand."""
    found = list(rows(messages_of(reader)))
    parts = [PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK]
    for group in [*GROUPS, "Other"]:
        table = sorted({(_first(cause), cause, remedy) for g, cause, remedy in found if g == group})
        lines = [f"| {_cause(cause)} | {_prose(remedy)} |" for _, cause, remedy in table]
        head = ["| what is wrong | what to do |", "| --- | --- |"]
        parts += [f"## {group}", "\n".join([*head, *lines])] if lines else []
    parts += [f"## {FINDINGS}", _findings(reader.findings())]
    return "\n\n".join(parts) + "\n"


def _first(cause: str) -> str:
    """The words by which a message is looked up in a list."""
    return re.sub(r"<\w+>|[^\w]|_", "", cause).lower()


def _cause(text: str) -> str:
    text = text.rstrip(":;").replace("|", r"\|")
    quoted = f"`` {text} ``" if "`" in text else f"`{text}`"
    return quoted if " " in text else f"{quoted} has another value"


def _prose(text: str) -> str:
    """As running text: what varies in ‹ ›, and nothing that Markdown would take for its own."""
    if text == "<remedy>":
        return "As the message says: it depends on the file, or the model."
    if text.startswith("pip install"):
        return f"`{text}`"
    text = re.sub(r"<(\w+)>", r"‹\1›", text.replace("<near>", "Did you mean …?")).replace("|", r"\|")
    text = re.sub(r"(?<!`)([*<\[\]])(?![^`]*`[^`]*$)", r"\\\1", text)
    return text if text.startswith(("`", "~")) else text[:1].upper() + text[1:]


def _findings(found: Iterable[Message]) -> str:
    pairs = {tuple(tidy(part) or part for part in m.text.split(" | ")) for m in found}
    named = sorted((what, remedy) for what, remedy in pairs if tidy(what) and "None" not in what)
    lines = [f"| {what.replace('<', '‹').replace('>', '›')} | {_told(remedy)} |" for what, remedy in named]
    return "\n".join(["| found | what `data.strict=false` does |", "| --- | --- |", *lines])


def _told(remedy: str) -> str:
    return "…" if "<" in remedy else remedy


if __name__ == "__main__":
    PAGE.write_text(written(Reader.of_package()), encoding="utf-8")
