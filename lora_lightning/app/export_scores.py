"""What an exported file scores: the task's own test, with the file in the network's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning.app.evaluate import score_rows
from lora_lightning.errors import UserError
from lora_lightning.exporting.checks import Run
from lora_lightning.exporting.exported import Exported
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.exporting.subject import rows_of, sizes_of, to_bytes
from lora_lightning.utils.tables import format_table


@dataclass(frozen=True)
class FileScores:
    """What a file scores.

    Attributes:
        values: of the test data, by name, as the task logs them.
        rows: label, the model's and the file's score of each.
        intervals: of scores, by name, where the task knows them.
    """

    values: dict[str, float]
    rows: list[tuple[str, str, str]]
    intervals: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        return format_table(("score on the test data", "the model", "the file"), self.rows)


class FromFile(nn.Module):
    """A file in the place of a network.

    Args:
        run: arrays by name -> those that come out, in their order.
        names: of the inputs, in the order of the network's arguments.
        shown: mean and std of pictures, where the file takes bytes.
        singly: the file takes one row of a batch.
    """

    def __init__(
        self, run: Run, names: Sequence[str], shown: Mapping[str, Any] | None = None, singly: bool = False
    ) -> None:
        super().__init__()
        self.run, self.names, self.shown, self.singly = run, tuple(names), shown, singly

    def forward(self, *inputs: Tensor) -> Any:
        """A tensor, or a tuple of several, where the inputs are."""
        given = dict(zip(self.names, [value.detach().cpu() for value in inputs], strict=True))
        if self.shown is not None:
            given = {name: to_bytes(value, self.shown) for name, value in given.items()}
        try:
            found = [
                self.run({name: value.numpy() for name, value in one.items()}) for one in self._parts(given)
            ]
        except Exception as error:  # the runtimes' own, for whatever a size may be
            reason = " ".join(str(error).split())[:240]
            raise UserError(
                f"evaluate=true: the file does not take {sizes_of(given)} of the test data: {reason}. Give "
                "format=onnx with axes=size, or leave evaluate out."
            ) from None
        arrays = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        tensors = tuple(torch.from_numpy(array).to(inputs[0].device) for array in arrays)
        return tensors[0] if len(tensors) == 1 else tensors

    def _parts(self, given: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What the file is given at a time."""
        return rows_of(given) if self.singly else [dict(given)]


def file_scores(
    task: Any,
    test: Callable[[], dict[str, float]],
    told: Exported,
    shown: Mapping[str, Any] | None = None,
) -> FileScores:
    """Test the task's network, then the file in its place.

    Args:
        task, test: of `evaluate.tester`. The task has the file for a network afterwards.
        told: of one of `SCORED`.
        shown: mean and std of pictures, where the file takes bytes.

    Raises:
        UserError: the file does not take the test data.
    """
    before = score_rows(task, test())
    run: Any = FORMATS[told.format].load(told.folder)
    singly = all(sizes[0] == 1 for sizes in told.inputs.values())
    task.model = FromFile(run, list(told.inputs), shown, singly)
    metrics = test()
    rows = [(name, old, new) for (name, old), (_, new) in zip(before, score_rows(task, metrics), strict=True)]
    values = {s.name: metrics[f"test/{s.name}"] for s in task.scores if f"test/{s.name}" in metrics}
    intervals = task.intervals() if hasattr(task, "intervals") else {}
    return FileScores(values, rows, {name: (low, high) for name, (low, high) in intervals.items()})
