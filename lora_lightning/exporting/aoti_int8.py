"""int8 for graphs compiled by AOTInductor, as oneDNN's kernels in torch take it on x86 processors."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from lora_lightning.errors import UserError
from lora_lightning.exporting.aoti import compile_graph
from lora_lightning.exporting.program import quietly, told_as
from lora_lightning.exporting.pt2e import TAKEN, int8_program
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

__all__ = ["TAKEN", "quantize"]
FUNCTIONS = {"dynamic": (F.linear,), "static": (F.linear, F.conv1d, F.conv2d)}
X86 = ("x86_64", "AMD64")


def quantize(file: Path, subject: Subject, kind: str, calibration: Sequence[Mapping[str, Tensor]]) -> None:
    """Put the int8 package in the place of one in floats. Torch alone runs it.

    Args:
        calibration: inputs by name, for "static".

    Raises:
        LibraryError: torchao is missing.
        UserError: the machine is of another kind, or the quantizer does not take the model.
    """
    if (machine := platform.machine()) not in X86:
        raise UserError(
            f"quantize={kind!r}: of format='aoti' is for x86 processors, and this is {machine}: give "
            "format='onnx' or 'executorch', or leave it out."
        )
    with quietly(), loading("torchao", "int8"):
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as tools

    class Quantizer(tools.X86InductorQuantizer):
        """That leaves some nodes alone."""

        def __init__(self, may: Callable[[Node], bool]) -> None:
            super().__init__()
            self.may = may

        def annotate(self, model: Any) -> Any:
            found = super().annotate(model)
            for node in found.graph.nodes:
                if not self.may(node):
                    node.meta.pop("quantization_annotation", None)
            return found

    def quantizer(may: Callable[[Node], bool]) -> Any:
        config = tools.get_default_x86_inductor_quantization_config(is_dynamic=kind == "dynamic")
        made = Quantizer(may)
        for function in FUNCTIONS[kind]:
            made.set_function_type_qconfig(function, config)
        return made

    with told_as("torchao's quantizer", subject), torch.no_grad():
        program = int8_program(subject, quantizer, calibration)
    compile_graph(program, file, subject, frozen=True)
