"""A program for ExecuTorch (.pte), the runtime of phones and small boards, with XNNPACK's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    with quietly(), loading("executorch", EXTRA):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    program = program_of(subject)
    with told_as("ExecuTorch", subject), torch.no_grad():
        made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        (folder / FILE).write_bytes(made.buffer)


def load(folder: Path, _subject: Subject | None = None) -> Run:
    """Runs the file by ExecuTorch's own runtime.

    Raises:
        LibraryError: it is missing.
    """
    with quietly(), loading("executorch", EXTRA):
        from executorch.runtime import Runtime
    program = Runtime.get().load_program(folder / FILE)  # lives as long as its method
    method = program.load_method("forward")

    def run(inputs: Arrays) -> list[Any]:
        found = method.execute([torch.from_numpy(array) for array in inputs.values()])
        return [tensor.clone().numpy() for tensor in found]

    return run
