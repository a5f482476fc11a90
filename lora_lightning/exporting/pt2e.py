"""int8 in a graph of `torch.export`: of weights alone, or of activations, too, by what inputs have shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, ops
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from lora_lightning.exporting.program import axes_of_graph, program_of, without_sources
from lora_lightning.exporting.subject import Subject

LINEAR = (ops.aten.linear.default,)
CONVOLUTIONS = (ops.aten.conv1d.default, ops.aten.conv2d.default)
OPERATORS = {"dynamic": LINEAR, "static": (*LINEAR, *CONVOLUTIONS)}
TAKEN = {"dynamic": ("linear layers",), "static": ("linear layers", "convolutions")}


def int8_program(
    subject: Subject,
    quantizer_of: Callable[[Callable[[Node], bool]], Any],
    calibration: Sequence[Mapping[str, Tensor]],
) -> ExportedProgram:
    """The graph, its layers' weights in int8 with a scale a row.

    Args:
        quantizer_of: makes a backend's quantizer from what says of a node whether it may be in int8. Fixed
            tables, such as those from a spectrum to mels, may not: what goes in there is of all sizes.
        calibration: inputs by name, for activations; the example where there is none.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = program_of(subject).module()
    tables = {name for name, _ in graph.named_buffers()}
    watched = prepare_pt2e(graph, quantizer_of(_no_product_of(tables)))
    for inputs in calibration or [subject.inputs]:
        watched(*(inputs[name] for name in subject.inputs))
    made: GraphModule = convert_pt2e(watched)
    example = tuple(subject.inputs.values())
    program = torch.export.export(made, example, dynamic_shapes=axes_of_graph(subject))
    without_sources(program)
    return program


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
