"""A graph of `torch.export` (.pt2), run by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_lightning.exporting.checks import Arrays, Run
from lora_lightning.exporting.program import program_of, quietly
from lora_lightning.exporting.subject import Subject

FILE = "model.pt2"


def write(subject: Subject, folder: Path) -> None:
    """Write the graph and its weights.

    Raises:
        UserError: the model cannot be traced as a whole.
    """
    program = program_of(subject)
    with quietly():
        torch.export.save(program, folder / FILE)


def load(folder: Path, _subject: Subject | None = None) -> Run:
    """Runs the file's graph as torch runs any module."""
    with quietly():
        return arrays_of(torch.export.load(folder / FILE).module())


def arrays_of(module: Any) -> Run:
    """A module of tensors as a function of arrays."""

    @torch.no_grad()
    def run(inputs: Arrays) -> list[Any]:
        return [tensor.numpy() for tensor in module(*map(torch.from_numpy, inputs.values()))]

    return run
