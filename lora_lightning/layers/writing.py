"""Writing a weight that a module's own parametrization computes, such as weight norm's from g and v."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, remove_parametrizations


def inverted(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor] | None:
    """The originals, by their names in the parametrization, from which it computes `value`; None where it
    cannot: spectral norm makes its own multiple of whatever it is given.

    The parametrization's own right inverse gives them, in float64 on a copy: it may write into itself.
    """
    own = cast(ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[name])
    trial = copy.deepcopy(own).to("cpu", torch.float64).eval()
    before = {n: b.clone() for n, b in trial.named_buffers()}
    wanted = value.detach().to("cpu", torch.float64)
    try:
        trial.right_inverse(wanted)
        with torch.no_grad():
            made = trial()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    moved = any(not torch.equal(b, before[n]) for n, b in trial.named_buffers() if n in before)
    if moved or not torch.allclose(made, wanted, rtol=1e-6, atol=1e-9):
        return None
    parameters = dict(trial.named_parameters(recurse=False))
    return {n: parameters[n].detach().to(p.device, p.dtype) for n, p in own.named_parameters(recurse=False)}


def set_weights(module: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Write values into a plain module's parameters; into a parametrized one through its originals, so that
    the names in its `state_dict()` stay. New parameters take the places: others may share the old ones.

    Returns:
        The names of those whose parametrization cannot compute the value, and which are plain now.
    """
    plain = []
    for name, weight in weights.items():
        if is_parametrized(module, name):
            originals = inverted(module, name, weight)
            if originals is not None:
                places = cast(nn.ModuleDict, module.parametrizations)[name]._parameters
                places.update({n: nn.Parameter(t) for n, t in originals.items()})
                continue
            own = cast(nn.ModuleDict, module.parametrizations)[name]
            settle(module, name, keep_value=not own.is_tensor)  # never writes so
            plain.append(name)
        setattr(module, name, nn.Parameter(weight))
    return plain


def settle(module: nn.Module, name: str, keep_value: bool) -> None:
    """Make a plain parameter of one that a parametrization computes, in this module alone.

    Args:
        keep_value: of what is computed; else of its original.
    """
    shared = type(module)  # copies of the module have this class too, and torch deletes the name from it
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    remove_parametrizations(module, name, leave_parametrized=keep_value)
