"""Layer-wise rate decay: how far from the output each parameter is, in blocks."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lora_lightning.planning.structure import blocks_in_order
from lora_lightning.utils.names import inside, named_modules, named_parameters


def layers_of(model: nn.Module) -> tuple[dict[int, int], int]:
    """The layer of each parameter by its identity, and the greatest there is.

    In models of timm it is as `timm.optim.param_groups_layer_decay` counts, by `group_matcher`. Elsewhere 0
    is what stands before the blocks, then each block counts one, and what stands behind them one more.
    """
    timm = sys.modules.get("timm.models")  # where one of its models is, it is loaded
    for module in named_modules(model).values() if timm else ():
        matcher = getattr(type(module), "group_matcher", None)  # wrappers have the methods of what they wrap
        if callable(matcher):
            return _timm_layers(model, module, timm)
    blocks = blocks_in_order(model)
    layers: dict[str, int] = {}
    reached, last = 0, len(blocks) + 1
    for name in named_parameters(model):
        at = next((i for i, block in enumerate(blocks, 1) if inside(name, [block])), None)
        if at is not None:
            reached = at
        layers[name] = last if at is None and reached == len(blocks) else reached
    return {id(p): layers[n] for n, p in named_parameters(model).items()}, last


def _timm_layers(model: nn.Module, module: Any, timm: Any) -> tuple[dict[int, int], int]:
    """What is outside of the network that counts stands behind it."""
    counted = timm.group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    last = max(counted.values())
    known = {id(p): counted[n] for n, p in module.named_parameters()}
    return {id(p): known.get(id(p), last) for p in model.parameters()}, last
