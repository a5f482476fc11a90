"""What `export` was given to run: the example, inputs to compare on, and those of a calibration, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora_lightning.exporting.checks import fresh_inputs
from lora_lightning.exporting.reference import as_bytes
from lora_lightning.exporting.subject import Axes, Example, axes_of, inputs_of

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """Inputs by the names of the model's arguments.

    Attributes:
        example: empty without one.
        axes: the dynamic ones of these.
        tried: on which the file is compared; none without an example.
        calibration: of static int8.
    """

    example: Named
    axes: Axes
    tried: list[Named]
    calibration: list[Named]


def given_of(
    model: nn.Module,
    example: Example | None,
    dynamic: bool | Mapping[str, Mapping[int, str]],
    check: Sequence[Example] | None,
    calibration: Sequence[Example] | None,
    inside: bool,
) -> Given:
    """The options of `export` of the same names as one.

    Raises:
        ConfigError, UserError: as `axes_of` and `inputs_of`.
    """
    inputs = {} if example is None else inputs_of(model, example)
    axes = axes_of(inputs, dynamic)
    tried = [inputs_of(model, one, "check") for one in check or ()]
    if inside:
        inputs, *tried = ({n: as_bytes(v) for n, v in one.items()} for one in (inputs, *tried))
    if example is None:
        tried = []
    elif not tried:
        tried = fresh_inputs(inputs, axes)
    return Given(inputs, axes, tried, [inputs_of(model, one, "calibration") for one in calibration or ()])
