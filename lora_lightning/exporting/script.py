"""`run.py` of an exported model: some twenty lines that run its file, with its runtime and numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.exporting.formats import Format
from lora_lightning.exporting.meaning import SOUND, is_pictures

HERE = """\
    if not Path(sys.argv[1]).is_file():
        sys.exit(f"{sys.argv[1]}: there is no such file; give {GIVEN}")"""
PICTURE = """\
    picture = np.load(sys.argv[1])
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        sys.exit(f"{sys.argv[1]}: give (height, width, 3) in uint8, not {picture.shape}, {picture.dtype}")"""
NORMALIZED = """\
    shown = json.loads((here / "preprocess.json").read_text())
    picture = ((picture / 255 - shown["mean"]) / shown["std"]).astype("float32")"""
WAVE = """\
    with wave.open(sys.argv[1]) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            sys.exit(f"{sys.argv[1]}: give one channel of 16 bits, RATE samples a second")
        sound = np.frombuffer(file.readframes(-1), "<i2").astype("float32")[None] / 32768"""
TOLD = {
    "class": """\
chances = np.exp((outputs[0] - outputs[0].max(1, keepdims=True)) / about["temperature"])
for row in chances / chances.sum(1, keepdims=True):
    print(", ".join(f"{about['names'][i]} {row[i]:.3f}" for i in row.argsort()[::-1][:5]))""",
    "classes": """\
for row in 1 / (1 + np.exp(-outputs[0] / about["temperature"])):
    print(", ".join(f"{about['names'][i]} {row[i]:.3f}" for i in row.argsort()[::-1] if row[i] >= 0.5))""",
    "number": """\
print(outputs[0][:, 0] * about["std"] + about["mean"])""",
    "masks": """\
for classes in outputs[0].argmax(1):
    found, counts = np.unique(classes, return_counts=True)
    print(", ".join(f"{about['names'][i]} {n / classes.size:.1%}" for i, n in zip(found, counts)))""",
    "text": """\
for row, count in zip(outputs[0].argmax(2), outputs[1]):
    kept = [i for i, before in zip(row[:count], [0, *row]) if i and i != before]
    print("".join(about["names"][i].replace("|", " ") for i in kept if len(about["names"][i]) == 1))""",
    "boxes": """\
for box, label, score in zip(*outputs):
    print(f"{about['names'][label - 1]} {score:.3f} " + " ".join(f"{edge:.1f}" for edge in box))""",
    "": """\
for output in outputs:
    print(output.shape, output.dtype, output.ravel()[:5])""",
}


def script_of(
    form: Format, inputs: tuple[str, ...], kind: str, preprocess: Mapping[str, Any] | None, inside: bool
) -> str:
    """The text of `run.py`.

    Args:
        inputs: their names.
        kind: what comes out, a key of `meaning.KINDS`; empty where nobody has said.
        inside: the file itself normalizes pictures.
    """
    argument, lines, standard = "inputs.npz", [], {"sys"}
    if is_pictures(preprocess) and len(inputs) == 1:
        argument, lines = "picture.npy", [PICTURE, *([] if inside else [NORMALIZED])]
        lines.append(f'    inputs = {{"{inputs[0]}": picture.transpose(2, 0, 1)[None]}}')
        standard |= set() if inside else {"json"}
    elif preprocess is not None and SOUND in preprocess and len(inputs) <= 2:
        lengths = "".join(f', "{name}": np.array([sound.shape[1]])' for name in inputs[1:])
        lines = [
            WAVE.replace("RATE", str(preprocess[SOUND])),
            f'    inputs = {{"{inputs[0]}": sound{lengths}}}',
        ]
        argument = "recording.wav"
        standard |= {"wave"}
    else:
        lines = ["    inputs = dict(np.load(sys.argv[1]))"]
    standard |= {"json"} if kind else set()
    lines = [HERE.replace("{GIVEN}", argument), *lines]
    needs = ", ".join(form.needs)
    words = f"[{argument}]{' [adapter=NAME]' if form.adapters else ''}"
    return "\n".join(
        [
            f'"""Runs {form.file}: python run.py {words}. Needs {needs} and numpy alone."""',
            "",
            *(f"import {name}" for name in sorted(standard)),
            "from pathlib import Path",
            "",
            "import numpy as np",
            f"import {form.imports}",
            "",
            "here = Path(__file__).parent",
            *(['about = json.loads((here / "names.json").read_text())'] if kind else []),
            form.opens,
            'inputs = dict(np.load(here / "example.npz"))',
            "if sys.argv[1:]:",
            *lines,
            f"outputs = {form.calls}",
            TOLD[kind],
            "",
        ]
    )
