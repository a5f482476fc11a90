"""int8 for ONNX files by onnxruntime: weights alone, or weights and activations by what inputs have shown."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.exporting.program import told_as
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

KINDS = ("dynamic", "static")
DYNAMIC = ("MatMul", "Gemm", "LSTM", "Attention")  # not Conv, which onnxruntime makes slower so
STATIC = ("Conv", "MatMul", "Gemm")
SMALLER = 0.8  # of the file in floats: more is not worth what it loses
WHO = "onnxruntime's quantizer"


def quantize_problems(quantize: str | None, calibration: Sequence[Any] | None, format: str) -> list[str]:
    """What is wrong with these options of `export`, one line each."""
    if quantize is None:
        return (
            ["calibration: is for int8 alone: leave it out, or give quantize='static'."]
            if calibration is not None
            else []
        )
    if format != "onnx":
        return [f"quantize={quantize!r}: not with format={format!r}: give format='onnx', or leave it out."]
    if calibration is not None and not isinstance(calibration, (list, tuple)):
        kind = type(calibration).__name__
        return [f"calibration: is of type {kind}: give a list of inputs, each as example is."]
    if quantize == "static" and not calibration:
        return [
            "quantize='static': give calibration, a list of a few dozen inputs such as the model will meet; "
            "or quantize='dynamic', which needs none."
        ]
    if quantize == "dynamic" and calibration is not None:
        return ["calibration: quantize='dynamic' takes none: leave it out, or give quantize='static'."]
    return []


def quantized(
    file: Path, subject: Subject, quantize: str, calibration: Iterable[Mapping[str, Tensor]]
) -> None:
    """Put the int8 file in the place of an ONNX file.

    Fixed tables, such as those from a spectrum to mels, stay in floats: what goes in there is of all sizes.

    Args:
        calibration: inputs by name, for "static".

    Raises:
        LibraryError: a library is missing.
        UserError: the model has next to nothing that can be quantized so.
    """
    with loading("onnxruntime", "export"):
        import onnxruntime.quantization as tools
    options: dict[str, Any] = {"per_channel": True, "weight_type": tools.QuantType.QInt8}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, told_as(WHO, subject):
        ready, small = Path(folder) / "ready.onnx", Path(folder) / "small.onnx"
        tools.quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
        calibration = [_as_taken(one, subject) for one in calibration]
        options["nodes_to_exclude"] = fixed_nodes(ready, subject)
        if quantize == "dynamic":
            options["extra_options"] = {"EnableSubgraph": True}  # a projected LSTM is a loop
            tools.quantize_dynamic(ready, small, op_types_to_quantize=[*DYNAMIC], **options)
        else:
            tools.quantize_static(
                ready, small, _Reader(calibration), op_types_to_quantize=[*STATIC], **options
            )
        share = small.stat().st_size / file.stat().st_size
        if share > SMALLER:
            kinds, other = (DYNAMIC, "static") if quantize == "dynamic" else (STATIC, "dynamic")
            raise UserError(
                f"quantize={quantize!r}: leaves {share:.0%} of {type(subject.network).__name__}'s bytes: "
                f"few of its weights are in {', '.join(kinds)}. Leave it out, or give quantize={other!r}."
            )
        small.replace(file)


def _as_taken(inputs: Mapping[str, Tensor], subject: Subject) -> Mapping[str, Tensor]:
    """Inputs as the file takes them.

    Raises:
        UserError: they are of other types.
    """
    for name, value in inputs.items():
        if value.dtype != (dtype := subject.inputs[name].dtype):
            raise UserError(
                f"calibration: {name} is of {value.dtype}, and the file takes {dtype}: give such."
            )
    return inputs


def fixed_nodes(file: Path, subject: Subject) -> list[str]:
    """The products of an ONNX file with tables that no training has made: buffers of the network."""
    import onnx

    model = onnx.load(str(file))
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    tables = [b.numpy() for b in subject.network.buffers() if b.is_floating_point() and b.dim() > 1]
    return [
        node.name
        for node in model.graph.node
        if node.op_type in {*DYNAMIC, *STATIC}
        and any(_same(values[name], table) for name in node.input if name in values for table in tables)
    ]


def _same(value: np.ndarray, table: np.ndarray) -> bool:
    """Whether these are one table, as it is or transposed."""
    forms = (table, np.swapaxes(table, -1, -2))
    return any(value.shape == form.shape and np.array_equal(value, form) for form in forms)


class _Reader:
    """Inputs one after the other, as the quantizer takes them."""

    def __init__(self, inputs: Iterable[Mapping[str, Tensor]]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        one = next(self.inputs, None)
        return None if one is None else {name: value.numpy() for name, value in one.items()}
