"""int8 for ONNX files by onnxruntime: weights alone, or weights and activations by what inputs have shown."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lora_lightning.exporting.program import told_as
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

TAKEN = {
    "dynamic": ("MatMul", "Gemm", "LSTM", "Attention"),  # not Conv, which onnxruntime makes slower so
    "static": ("Conv", "MatMul", "Gemm"),
}
WHO = "onnxruntime's quantizer"


def quantize(file: Path, subject: Subject, kind: str, calibration: Sequence[Mapping[str, Tensor]]) -> None:
    """Put the int8 file in the place of an ONNX file.

    Fixed tables, such as those from a spectrum to mels, stay in floats: what goes in there is of all sizes.

    Args:
        calibration: inputs by name, for "static".

    Raises:
        LibraryError: a library is missing.
        UserError: the quantizer does not take the file.
    """
    with loading("onnxruntime", "export"):
        import onnxruntime.quantization as tools
    options: dict[str, Any] = {"per_channel": True, "weight_type": tools.QuantType.QInt8}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, told_as(WHO, subject):
        ready, small = Path(folder) / "ready.onnx", Path(folder) / "small.onnx"
        tools.quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
        options["nodes_to_exclude"] = fixed_nodes(ready, subject)
        options["op_types_to_quantize"] = [*TAKEN[kind]]
        if kind == "dynamic":
            options["extra_options"] = {"EnableSubgraph": True}  # a projected LSTM is a loop
            tools.quantize_dynamic(ready, small, **options)
        else:
            tools.quantize_static(ready, small, _Reader(calibration), **options)
        small.replace(file)


def fixed_nodes(file: Path, subject: Subject) -> list[str]:
    """The products of an ONNX file with tables that no training has made: buffers of the network."""
    import onnx

    model = onnx.load(str(file))
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    tables = [b.numpy() for b in subject.network.buffers() if b.is_floating_point() and b.dim() > 1]
    return [
        node.name
        for node in model.graph.node
        if node.op_type in {*TAKEN["dynamic"], *TAKEN["static"]}
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
