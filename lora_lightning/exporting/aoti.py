"""A graph of `torch.export` compiled by AOTInductor for this machine (.pt2), run by torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.export import ExportedProgram

from lora_lightning.errors import UserError
from lora_lightning.exporting.checks import Run
from lora_lightning.exporting.program import program_of, quietly, told_as
from lora_lightning.exporting.pt2 import arrays_of
from lora_lightning.exporting.subject import Subject

FILE = "model.pt2"
COMPILERS = ("g++", "c++", "clang++")


def write(subject: Subject, folder: Path) -> None:
    """Write the graph compiled for the CPU of this machine, weights included.

    Raises:
        UserError: there is no compiler, or it cannot compile the model.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise UserError(
            f"export: format='aoti' compiles C++, and there is none of {', '.join(COMPILERS)} here: install "
            "one, or take format='pt2'."
        )
    compile_graph(program_of(subject), folder / FILE, subject)


def compile_graph(program: ExportedProgram, file: Path, subject: Subject, frozen: bool = False) -> None:
    """Write a graph compiled for the CPU of this machine.

    Args:
        frozen: weights are packed beforehand, without which int8 gains nothing.

    Raises:
        UserError: it cannot be compiled.
    """
    with told_as("AOTInductor", subject), torch.no_grad():
        from torch._inductor import aoti_compile_and_package, config

        with config.patch(freezing=frozen):
            aoti_compile_and_package(program, package_path=str(file))


def load(folder: Path, _subject: Subject | None = None) -> Run:
    """Runs the compiled package."""
    from torch._inductor import aoti_load_package

    with quietly():
        return arrays_of(aoti_load_package(str(folder / FILE)))
