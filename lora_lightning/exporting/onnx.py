"""ONNX by torch's exporter, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lora_lightning.errors import UserError
from lora_lightning.exporting.checks import Arrays, Run
from lora_lightning.exporting.program import program_of, told_as
from lora_lightning.exporting.recurrent import recurrent_nodes
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

FILE = "model.onnx"
WHO = "the exporter to ONNX"


def write(subject: Subject, folder: Path) -> None:
    """Write `model.onnx`; beside it `model.onnx.data` with the weights where one file cannot hold them, 2 GB.

    Raises:
        LibraryError: a library is missing.
        UserError: the model cannot be written so.
    """
    made(subject).save(str(folder / FILE))


def made(subject: Subject, computed: Collection[str] = ()) -> Any:
    """The file before it is written, a program of torch.onnx.

    Args:
        computed: as of `recurrent_nodes`.

    Raises:
        LibraryError, UserError: as `write`.
    """
    with loading("onnxscript", "export"):
        import onnx  # noqa: F401  # torch's exporter takes it
        import onnxscript  # noqa: F401  # the same
    with recurrent_nodes(subject.network, computed):
        program = program_of(subject)
    with told_as(WHO, subject):
        found = torch.onnx.export(
            program,
            input_names=list(subject.inputs),
            output_names=list(subject.outputs),
            dynamo=True,
            verbose=False,
        )
        assert found is not None
        _name_axes(found.model, subject)
        _without_notes(found.model)
    return found


def load(folder: Path, _subject: Subject | None = None) -> Run:
    """Runs the file, on one thread of the CPU as torch's default says.

    Raises:
        LibraryError: onnxruntime is missing.
    """
    session = opened_session(folder / FILE)
    takes = [one.name for one in session.get_inputs()]  # what the model does not use is no input of the file

    def run(inputs: Arrays) -> list[Any]:
        return list(session.run(None, {name: inputs[name] for name in takes}))

    return run


def opened_session(file: Path) -> Any:
    """An `onnxruntime.InferenceSession` of a file, on as many threads of the CPU as torch has.

    Raises:
        LibraryError: onnxruntime is missing.
        UserError: it does not take the file.
    """
    with loading("onnxruntime", "export"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(file, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, of many kinds
        reason = " ".join(str(error).split())[:240].rstrip(".")
        raise UserError(
            f"export: onnxruntime cannot load {file.name}: {reason}. Take another format."
        ) from None


def _without_notes(model: Any) -> None:
    """Take out what the exporter notes of each node for its own developers, up to a third of a small file."""
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _name_axes(model: Any, subject: Subject) -> None:
    """The dynamic axes by their names, where the exporter has numbered them."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in subject.dynamic.get(value.name, {}).items():
            dimension = value.shape[axis]
            if isinstance(dimension, onnx_ir.SymbolicDim) and dimension.value is not None:
                names.setdefault(dimension.value, name)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                [
                    onnx_ir.SymbolicDim(names.get(d.value, d.value))
                    if isinstance(d, onnx_ir.SymbolicDim) and d.value is not None
                    else d
                    for d in value.shape
                ]
            )
