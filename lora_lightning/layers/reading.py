"""Reading a plain module's weight, parametrized or not, without side effects."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The parameter `name`, or what its parametrization makes of it.

    In train mode torch's spectral norm takes a step of its iteration whenever the weight is read, and
    so changes the model; here it does not.
    """
    if not is_parametrized(module, name):
        return cast(Tensor, module._parameters[name])
    parametrization = cast(nn.ModuleDict, module.parametrizations)[name]
    modes = {part: part.training for part in parametrization.modules()}
    parametrization.eval()
    weight: Tensor = getattr(module, name)
    for part, mode in modes.items():
        part.training = mode
    return weight
