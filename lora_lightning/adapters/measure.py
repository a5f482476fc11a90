"""The measuring pass: a plain model is run over a few batches, and the spectra of its layers' inputs, or of
the gradients of their weights, are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, is_parametrized

from lora_lightning.adapters.input_watch import Functions, Seen, Watch
from lora_lightning.errors import UserError
from lora_lightning.layers.registry import slots_of
from lora_lightning.layers.slot import Slot
from lora_lightning.methods.data_inits import matrices_of
from lora_lightning.methods.moments import Moments, Spectrum, spectrum_of
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.names import submodule
from lora_lightning.utils.tables import truncate_list

# what is done with a batch: runs the model, and returns the loss where it is asked for
Step = Callable[[Any], Any]


def input_spectra(
    model: nn.Module, layers: Sequence[LayerPlan], batches: Iterable[Any], step: Step, ranks: dict[str, int]
) -> tuple[dict[str, Spectrum], int]:
    """The spectra of the inputs of planned layers, by their names, and the number of batches.

    Args:
        ranks: the most components that are asked for, by name.

    Raises:
        UserError: no batch came; inputs of some layers were not seen, or are not finite.
    """
    seen, count = seen_inputs(model, layers, batches, step, ranks)
    return _spectra({one.layer.name: one.moments.spectrum for one in seen if one.moments.rows}, layers), count


def seen_inputs(
    model: nn.Module, layers: Sequence[LayerPlan], batches: Iterable[Any], step: Step, ranks: dict[str, int]
) -> tuple[list[Seen], int]:
    """The second moments of the inputs of planned layers, those that were not seen included, and the number
    of batches.

    Args:
        ranks: the most components that are asked for, by name.

    Raises:
        UserError: no batch came.
    """
    seen = []
    for layer in layers:
        module = submodule(model, layer.module)
        slot = slots_of(layer.module, module)[layer.slot]
        columns = slot.factors(layer.shape, 1)[0]
        size = torch.Size(columns[1:]).numel()
        seen.append(Seen(layer, slot, module, Moments(size, slot.groups, ranks[layer.name])))
    watch = Watch(model, seen)
    hooks: list[Any] = []
    count = 0
    try:
        hooks += watch.hooks()
        for batch in batches:
            with torch.no_grad(), Functions(watch):
                step(batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    _refuse_none(count)
    return seen, count


def gradient_spectra(
    model: nn.Module, layers: Sequence[LayerPlan], batches: Iterable[Any], step: Step
) -> tuple[dict[str, Spectrum], int]:
    """The spectra of the mean gradient of planned layers' weights, by their names, and the number of batches.

    Raises:
        UserError: no batch came, a batch gives no loss, or a gradient is not finite; all of them are zero.
    """
    model.requires_grad_(False)
    places = [(submodule(model, layer.module), layer) for layer in layers]
    slots = {layer.name: slots_of(layer.module, module)[layer.slot] for module, layer in places}
    weights: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(cached())  # what a parametrization computes is one tensor, which has a gradient
        for module, layer in places:
            weights[layer.name] = _leaf(module, slots[layer.name].parameter)
        for batch in batches:
            loss = loss_of(step(batch))
            if not loss.requires_grad:
                raise UserError(
                    "the loss does not depend on any adapted layer: compute it with gradients, of their "
                    "outputs"
                )
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    part = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    sums[name] = sums[name] + part if name in sums else part
            count += 1
    _refuse_none(count)
    if not any(gradient.any() for gradient in sums.values()):
        raise UserError(
            "the gradient of every adapted layer is zero, as behind a new head, which begins at zero: load "
            "weights whose head is trained, or give init='eva', which asks the inputs"
        )
    ready = {
        name: partial(_gradient_spectrum, slots[name], sums.get(name, torch.zeros_like(weight)) / count)
        for name, weight in weights.items()
    }
    return _spectra(ready, layers), count


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a tensor, a tuple of arguments or a dictionary of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(result: Any) -> Tensor:
    """The loss in what a step returns, a tensor or a mapping that has "loss".

    Raises:
        UserError: there is none.
    """
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError("a step returns no loss, whose gradient is asked for: return one number")
    return loss.sum()


def _gradient_spectrum(slot: Slot, gradient: Tensor) -> Spectrum:
    return spectrum_of(matrices_of(slot, gradient))


def _leaf(module: nn.Module, name: str) -> Tensor:
    """The weight that the module multiplies with, with a gradient."""
    if is_parametrized(module, name):
        parametrization: Any = cast(nn.ModuleDict, module.parametrizations)[name]
        parametrization.requires_grad_(True)
        weight: Tensor = getattr(module, name)
        return weight
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.requires_grad_(True)


def _refuse_none(count: int) -> None:
    if not count:
        raise UserError("the data give no batch: give at least one")


def _spectra(ready: Mapping[str, Callable[[], Spectrum]], layers: Sequence[LayerPlan]) -> dict[str, Spectrum]:
    """What was gathered, of every layer; all that is missing or wrong in one message.

    Raises:
        UserError: it is not of every layer, or not finite.
    """
    found: dict[str, Spectrum] = {}
    problems = []
    if unseen := [layer.name for layer in layers if layer.name not in ready]:
        problems.append(
            f"nothing shows the inputs of {truncate_list(unseen)}: no batch reaches them, or they multiply "
            "in a way of their own: name them in exclude_modules"
        )
    for name, make in ready.items():
        try:
            found[name] = make()
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError("; ".join(problems))
    return found
