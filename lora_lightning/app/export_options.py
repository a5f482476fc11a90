"""The section `export` of a run: its options, and what is wrong with them before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lora_lightning.files.allowed import BUILDERS
from lora_lightning.utils.marks import Check, one_of, show

LIBRARIES = {  # by the formats in which a run ends: what writes them, and the extra that brings it
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    "executorch": (("executorch",), "executorch"),
}
CHECKS: dict[str, Check] = {
    "format": one_of(*LIBRARIES).or_null(),
    "quantize": one_of("dynamic", "static").or_null(),
}
SPEECH = "lora_lightning.tasks.ctc.SpeechRecognizer"
TASKS = (  # of which a file is one network
    "lora_lightning.tasks.classification.ImageClassifier",
    "lora_lightning.tasks.segmentation.SemanticSegmenter",
    SPEECH,
)
BUILT = {**BUILDERS, "task": TASKS}
AFTER = "Leave export out, and export when the run has ended: lora-lightning export adapter=RUN out=FOLDER."


def is_wanted(values: Mapping[str, Any]) -> bool:
    """Whether a configuration ends in an exported file."""
    section = values.get("export")
    return isinstance(section, Mapping) and section.get("format") is not None


def export_problems(values: Mapping[str, Any]) -> list[str]:
    """What does not go together with `export` in a configuration."""
    section = values.get("export")
    if not is_wanted(values):
        quantize = section.get("quantize") if isinstance(section, Mapping) else None
        if not quantize:
            return []
        return [f"export.quantize={show(quantize)}: give export.format={' or '.join(LIBRARIES)} with it."]
    found, format = [], values["export"]["format"]
    if values.get("method") == "none":
        found.append(
            "export: method=none trains nothing: give method=lora, or lora-lightning export recipe=NAME."
        )
    for name, known in BUILT.items():
        node = values.get(name)
        target = node.get("_target_") if isinstance(node, Mapping) else None
        if target is not None and target not in known:
            short = str(target).rpartition(".")[2]
            why = "is of no kind that a run exports" if name == "task" else "is not of this package"
            found.append(f"export: {name} {short} {why}. {AFTER}")
    task = values.get("task")
    if format == "executorch" and isinstance(task, Mapping) and task.get("_target_") == SPEECH:
        found.append(
            "export.format=executorch: takes sound of one length, and the run's utterances, which test it, "
            "are of many: give export.format=onnx."
        )
    trainer = values.get("trainer")
    if isinstance(trainer, Mapping) and _is_several(trainer):
        found.append(f"export: is for one process, and the run has several. {AFTER}")
    for name, (libraries, extra) in LIBRARIES.items():
        lacking = [library for library in libraries if find_spec(library) is None]
        if lacking and name == format:
            found.append(f"export: needs {', '.join(lacking)}: pip install 'lora-lightning[{extra}]'")
    return found


def _is_several(trainer: Mapping[str, Any]) -> bool:
    devices = trainer.get("devices")
    many = len(devices) if isinstance(devices, list) else devices
    return (isinstance(many, int) and many > 1) or trainer.get("num_nodes", 1) not in (1, None)
