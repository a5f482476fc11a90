"""A graph of `torch.export` (.pt2), and the same compiled by AOTInductor: both are run by torch alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lora_lightning.errors import UserError
from lora_lightning.exporting.checks import Arrays, Run
from lora_lightning.exporting.program import program_of, quietly, told_as
from lora_lightning.exporting.subject import Subject

FILE = "model.pt2"
COMPILERS = ("g++", "c++", "clang++")


def write(subject: Subject, folder: Path) -> None:
    """Write the graph and its weights.

    Raises:
        UserError: the model cannot be traced as a whole.
    """
    program = program_of(subject)
    with quietly():
        torch.export.save(program, folder / FILE)


def load(folder: Path) -> Run:
    """Runs the file's graph as torch runs any module."""
    with quietly():
        return _arrays(torch.export.load(folder / FILE).module())


def write_compiled(subject: Subject, folder: Path) -> None:
    """Write the graph compiled for the CPU of this machine, weights included.

    Raises:
        UserError: there is no compiler, or it cannot compile the model.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise UserError(
            f"export: format='aoti' compiles C++, and there is none of {', '.join(COMPILERS)} here: install "
            "one, or take format='pt2'."
        )
    program = program_of(subject)
    with told_as("AOTInductor", subject):
        from torch._inductor import aoti_compile_and_package

        aoti_compile_and_package(program, package_path=str(folder / FILE))


def load_compiled(folder: Path) -> Run:
    """Runs the compiled package."""
    from torch._inductor import aoti_load_package

    with quietly():
        return _arrays(aoti_load_package(str(folder / FILE)))


def _arrays(module: Any) -> Run:
    @torch.no_grad()
    def run(inputs: Arrays) -> list[Any]:
        return [tensor.numpy() for tensor in module(*map(torch.from_numpy, inputs.values()))]

    return run
