"""Lightning's callbacks that average weights (EMA, SWA) beside LoRACallback, in either order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_lightning.layers.norm import FrozenNorm
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.resume_loops import instead_once
from lora_lightning.utils.names import named_parameters


def average_the_adapted(trainer: Any, module: nn.Module) -> None:
    """After the injection: a callback that stands before ours has copied the model as it was; let it copy
    again. And let SWA leave frozen norms alone: it would reset their statistics and make new ones."""
    for callback in trainer.callbacks:
        if is_a(callback, "StochasticWeightAveraging"):
            callback.pl_module_contains_batch_norm = _has_moving_norm
            reset = type(callback).reset_batch_norm_and_save_state
            callback.reset_batch_norm_and_save_state = partial(_reset_moving, partial(reset, callback))
        if is_a(callback, "StochasticWeightAveraging", "WeightAveraging"):
            copied = callback._average_model
            if copied is not None and _names(getattr(copied, "module", copied)) != _names(module):
                callback.setup(trainer, module, trainer.state.fn.value)


def go_on_averaging(trainer: Any, module: Any, between_epochs: bool) -> None:
    """Let SWA take up its scheduler, and in its last epoch, which renews the statistics of norms, what it
    does at that epoch's start: both are made there, with changes that the checkpoint has behind it."""
    for callback in trainer.callbacks:
        if is_a(callback, "StochasticWeightAveraging") and callback._scheduler_state is not None:
            if between_epochs:
                instead_once(callback, "on_train_epoch_start", partial(_keeping_rates, callback))
            else:
                _keeping_statistics(callback, trainer, module)


def finish_averages(trainer: Any, module: Any) -> None:
    """Give the module its averages at the end of a fit that found nothing left to train."""
    for callback in trainer.callbacks:
        swa = is_a(callback, "StochasticWeightAveraging")
        if swa and callback._model_contains_batch_norm and trainer.current_epoch - 1 > callback.swa_end:
            trainer.fit_loop.max_epochs -= 1  # the module has them since the epoch that renewed statistics
        elif swa or is_a(callback, "WeightAveraging"):
            callback.on_train_end(trainer, module)


def _keeping_rates(callback: Any, trainer: Any, module: Any) -> None:
    """SWA's `on_train_epoch_start`, without the step that a new scheduler makes."""
    groups = trainer.optimizers[0].param_groups
    rates = [group["lr"] for group in groups]
    callback.on_train_epoch_start(trainer, module)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _keeping_statistics(callback: Any, trainer: Any, module: nn.Module) -> None:
    """The same in the middle of an epoch: norms have statistics of its first batches."""
    kept = [{n: b.clone() for n, b in norm.named_buffers()} for norm in moving_norms(module)]
    _keeping_rates(callback, trainer, module)
    for norm, buffers in zip(moving_norms(module), kept, strict=True):
        for name, buffer in buffers.items():
            norm.get_buffer(name).copy_(buffer)


def keep_equal_values(trainer: Any) -> None:
    """Averages of equal numbers are made exactly that number, so that frozen weights stay what they are:
    d·w + (1 - d)·w is not always w. To be called when every callback was set up."""
    for callback in trainer.callbacks:
        if is_a(callback, "WeightAveraging") and callback._average_model is not None:
            model = callback._average_model
            if model.avg_fn is not None and not isinstance(model.avg_fn, _KeepsEqual):
                model.avg_fn = _KeepsEqual(model.avg_fn)


@torch.no_grad()
def average_anew(trainer: Any, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Begin the averages of these parameters anew, with their values of now."""
    meant = {id(p) for p in parameters}
    for callback in trainer.callbacks:
        if is_a(callback, "WeightAveraging") and callback._average_model is not None:
            averages = named_parameters(callback._average_model.module)
            for name, parameter in named_parameters(module).items():
                if id(parameter) in meant:
                    averages[name].copy_(parameter)


class _KeepsEqual:
    def __init__(self, average: Callable[..., Tensor]) -> None:
        self.average = average

    def __call__(self, averaged: Tensor, current: Tensor, *rest: Any) -> Tensor:
        current = current.to(averaged.device)
        return torch.where(averaged == current, averaged, self.average(averaged, current, *rest))


def _names(module: nn.Module) -> list[str]:
    return list(named_parameters(module))


def moving_norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers whose running statistics move."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, FrozenNorm)]


def _has_moving_norm(module: nn.Module) -> bool:
    return bool(moving_norms(module))


def _reset_moving(reset: Callable[[Any], None], module: Any) -> None:
    reset(SimpleNamespace(modules=lambda: moving_norms(module), device=module.device))
