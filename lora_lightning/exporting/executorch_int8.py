"""int8 for ExecuTorch's programs, as XNNPACK's kernels take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lora_lightning.exporting.executorch import EXTRA, lowered
from lora_lightning.exporting.program import quietly, told_as
from lora_lightning.exporting.pt2e import OPERATORS, TAKEN, int8_program
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

__all__ = ["TAKEN", "quantize"]


def quantize(file: Path, subject: Subject, kind: str, calibration: Sequence[Mapping[str, Tensor]]) -> None:
    """Put the int8 program in the place of one in floats.

    Args:
        calibration: inputs by name, for "static".

    Raises:
        LibraryError: ExecuTorch is missing.
        UserError: the quantizer does not take the model.
    """
    with quietly(), loading("executorch", EXTRA):
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as tools

    class Quantizer(tools.XNNPACKQuantizer):
        """That leaves numbers beside the layers alone: it would make floats of those added to integers."""

        def transform_for_annotation(self, model: Any) -> Any:
            return model

    def quantizer(may: Callable[[Node], bool]) -> Any:
        config = tools.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=kind == "dynamic")
        made = Quantizer().set_filter_function(may)
        for operator in OPERATORS[kind]:  # of all that it takes, a padding between some fails in its runtime
            made.set_operator_type(operator, config)
        return made

    with told_as("XNNPACK's quantizer", subject), torch.no_grad():
        program = int8_program(subject, quantizer, calibration)
    file.write_bytes(lowered(program, subject))
