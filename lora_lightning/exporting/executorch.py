"""A program for ExecuTorch (.pte), the runtime of phones and small boards, with XNNPACK's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lora_lightning.errors import UserError
from lora_lightning.exporting.checks import Arrays, Run
from lora_lightning.exporting.program import program_of, quietly, told_as
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

FILE = "model.pte"
EXTRA = "executorch"


def write(subject: Subject, folder: Path) -> None:
    """Write the program, whose memory is planned for the sizes of the example.

    Raises:
        LibraryError: ExecuTorch is missing.
        UserError: the model cannot be written so.
    """
    (folder / FILE).write_bytes(lowered(program_of(subject), subject))


def lowered(program: ExportedProgram, subject: Subject) -> bytes:
    """A graph as a program of ExecuTorch.

    Raises:
        LibraryError, UserError: as `write`.
    """
    with quietly(), loading("executorch", EXTRA):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    with told_as("ExecuTorch", subject), torch.no_grad():
        # Its check refuses views of complex numbers, as of a spectrum, which its runtime takes.
        config = EdgeCompileConfig(_check_ir_validity=False)
        made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
        return bytes(made.to_executorch().buffer)


def load(folder: Path, _subject: Subject | None = None) -> Run:
    """Runs the file by ExecuTorch's own runtime.

    Raises:
        LibraryError: it is missing.
        UserError: it does not take the file.
    """
    with quietly(), loading("executorch", EXTRA):
        from executorch.runtime import Runtime
    try:
        program = Runtime.get().load_program(folder / FILE)  # lives as long as its method
        method = program.load_method("forward")
    except RuntimeError as error:
        raise UserError(
            f"export: ExecuTorch's runtime cannot load {FILE}: {error}. Take another format."
        ) from None

    def run(inputs: Arrays) -> list[Any]:
        found = method.execute([torch.from_numpy(array) for array in inputs.values()])
        return [tensor.clone().numpy() for tensor in found]

    return run
