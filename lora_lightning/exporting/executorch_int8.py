"""int8 for ExecuTorch's programs: weights alone, or weights and activations, for XNNPACK's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, ops
from torch.fx import Node

from lora_lightning.exporting.executorch import EXTRA, lowered
from lora_lightning.exporting.program import program_of, quietly, told_as
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

LINEAR = (ops.aten.linear.default,)
CONVOLUTIONS = (ops.aten.conv1d.default, ops.aten.conv2d.default)
OPERATORS = {"dynamic": LINEAR, "static": (*LINEAR, *CONVOLUTIONS)}
TAKEN = {"dynamic": ("linear layers",), "static": ("linear layers", "convolutions")}


def quantize(file: Path, subject: Subject, kind: str, calibration: Sequence[Mapping[str, Tensor]]) -> None:
    """Put the int8 program in the place of one in floats; a weight's every row has a scale.

    Fixed tables, such as those from a spectrum to mels, stay in floats.

    Args:
        calibration: inputs by name, for "static".

    Raises:
        LibraryError: ExecuTorch is missing.
        UserError: the quantizer does not take the model.
    """
    with quietly(), loading("executorch", EXTRA):
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as tools
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    with told_as("XNNPACK's quantizer", subject), torch.no_grad():
        graph = program_of(subject).module()
        config = tools.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=kind == "dynamic")
        tables = {name for name, _ in graph.named_buffers()}
        quantizer = tools.XNNPACKQuantizer().set_filter_function(_no_product_of(tables))
        for operator in OPERATORS[kind]:
            quantizer.set_operator_type(operator, config)
        watched = prepare_pt2e(graph, quantizer)
        for inputs in calibration or [subject.inputs]:
            watched(*(inputs[name] for name in subject.inputs))
        program = torch.export.export(convert_pt2e(watched), tuple(subject.inputs.values()))
    file.write_bytes(lowered(program, subject))


def _no_product_of(tables: set[str]) -> Callable[[Node], bool]:
    """Whether a node is none that multiplies by one of these tables, as it is or transposed."""

    def is_other(node: Node) -> bool:
        if node.target not in OPERATORS["static"]:
            return True
        weight = node.args[1]
        while isinstance(weight, Node) and weight.op == "call_function":
            weight = weight.args[0]
        return isinstance(weight, Node) and weight.target not in tables

    return is_other
