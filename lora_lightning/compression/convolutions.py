"""Convolutions as the parts of a form: the layer's own options, no values yet."""

from __future__ import annotations

from typing import Any

from torch import nn

CONVS = (nn.Conv1d, nn.Conv2d)


def options_of(layer: Any) -> dict[str, Any]:
    """How a convolution walks over its input."""
    return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def conv(layer: Any, inner: int, out: int, options: dict[str, Any], last: bool = False) -> nn.Module:
    """A convolution of the layer's kind, without values."""
    if "padding" in options:
        options = {**options, "padding_mode": layer.padding_mode}
    base = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    return nn.utils.skip_init(
        base, inner, out, bias=last and layer.bias is not None,
        device=layer.weight.device, dtype=layer.weight.dtype, **options,
    )  # fmt: skip
