"""Checks that an adapted model is what it claims to be."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters import adapters_off, lora_parameters, merge, unmerge
from lora_lightning.base_values import refuse_meta, refuse_replaced
from lora_lightning.inject import eject
from lora_lightning.layers import LoRALayer, lora_layers, update_ids
from lora_lightning.layers.layer import slot_key
from lora_lightning.names import named_parameters, submodule
from lora_lightning.record import injection_of
from lora_lightning.report import listed
from lora_lightning.sharding import refuse_sharded


def verify(model: nn.Module, example_batch: Any) -> list[str]:
    """Check the library's promises on this model, by running it. The model itself is not touched.

    Checked on copies: adapters off gives the base model's outputs bit for bit; every adapted layer
    gets a gradient, in train and in eval mode; an optimizer step with weight decay leaves every frozen
    tensor bit for bit; merged outputs equal unmerged ones to 1e-5 of their size (float32; 1e-2 in half
    precision); unmerging restores the weights bit for bit.

    Args:
        model: the module that was given to `inject`.
        example_batch: what `model` is called with: a tensor, a tuple of arguments or a dictionary of
            keyword arguments.

    Returns:
        One line for each promise that failed; empty when all hold.

    Raises:
        UserError: the model is not adapted, or sharded.
    """
    injection_of(model)
    refuse_sharded(model, "verify")
    refuse_replaced(model)
    refuse_meta(model, "verify")
    checks = (_off_is_base, _gradients_arrive, _frozen_stays, _merged_is_unmerged)
    return [failure for check in checks for failure in check(_randomized(model), example_batch)]


def gradient_peaks(model: nn.Module) -> dict[str, float | None]:
    """The largest absolute gradient of each active update after a backward, by its name in the plan;
    with several adapters selected, with the adapter's name behind it.

    None: the backward gave it no gradient. At the start, when B is zero, A's gradient is zero in every
    layer; B's is not.
    """
    injection = injection_of(model)
    peaks: dict[str, float | None] = {}
    for adapter in injection.active:
        for planned in injection.adapters[adapter].plan.layers:
            layer = cast(LoRALayer, submodule(model, planned.module))
            if adapter not in layer.lora_active:
                continue
            update = cast(nn.ModuleDict, layer.lora[adapter])[slot_key(planned.slot)]
            grads = [p.grad for p in update.parameters() if p.grad is not None]
            name = planned.name if len(injection.active) == 1 else f"{planned.name} of {adapter}"
            peaks[name] = torch.stack([g.abs().max() for g in grads]).max().item() if grads else None
    return peaks


def dead_updates(model: nn.Module) -> list[str]:
    """Adapted layers that the last backward gave no gradient, or only zeros."""
    return [name for name, peak in gradient_peaks(model).items() if not peak]


class FirstSteps:
    """What the first training steps show: is every update used, and is its gradient finite?

    One step is not enough to tell: LayerDrop, several optimizers or a gate that begins at zero leave an
    update out of some. Seen alive once, it is alive; a gradient that is not finite is a fault whenever
    it is seen, unless a GradScaler is there to skip the step.

    Args:
        model: the module that was given to `inject`.
        steps: how many training steps are watched.

    Attributes:
        observed: training steps seen so far.
    """

    def __init__(self, model: nn.Module, steps: int = 5) -> None:
        self.model, self.steps, self.observed = model, steps, 0
        self._best: dict[str, float | None] = {}
        self._broken: dict[str, None] = {}
        self._fresh = False

    def after_backward(self, scaled: bool = False) -> None:
        """Look at the gradients. `scaled`: a GradScaler looks after those that are not finite."""
        self._fresh = True
        for name, peak in gradient_peaks(self.model).items():
            if peak is not None and not math.isfinite(peak) and not scaled:
                self._broken[name] = None
            if not self._best.get(name):  # None, then 0, then alive
                self._best[name] = peak if peak is not None else self._best.get(name)

    def after_step(self) -> bool:
        """Count a step, if it had a backward; true when enough were seen."""
        self.observed += self._fresh
        self._fresh = False
        return self.observed >= self.steps

    def faults(self) -> list[str]:
        """One line for each thing that is wrong: how many layers, which, and why that usually happens."""
        unused = [n for n, peak in self._best.items() if peak is None]
        zero = [n for n, peak in self._best.items() if peak == 0]
        return [
            f"{len(names)} of {len(self._best)} {what} in the first {self.observed} training steps: "
            f"{listed(names, most=8)}. {why}"
            for names, what, why in (
                (unused, "adapted layers got no gradient", UNUSED),
                (zero, "adapted layers got a gradient of zero alone", ZERO),
                (list(self._broken), "adapted layers got a gradient with NaN or infinity", BROKEN),
            )
            if names
        ]


UNUSED = (
    "Either the forward does not use them (the layer is never called, its parent reads another weight, "
    "LayerDrop skipped it each time, the updates are merged), or their output does not reach the loss (it "
    "is detached, computed under no_grad, or left out of the loss). Name them in exclude_modules, or mend "
    "the forward."
)
ZERO = (
    "The forward uses them, but they do not change the loss: a gate or mask of zero, or an activation "
    "that is off for every input, lies behind them. Name them in exclude_modules if that stays so."
)
BROKEN = (
    "The loss overflowed or is NaN. Look at the batch and the loss, lower the learning rate or clip the "
    "gradients; in half precision prefer bf16-mixed to 16-true."
)


def call(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors in the model's output for a batch, flattened from any nesting."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    return [t for t in _tensors(output) if t.is_floating_point()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@torch.no_grad()
def _randomized(model: nn.Module) -> nn.Module:
    """A copy in which every update changes something: a fresh B is zero and would hide a fault."""
    model = copy.deepcopy(model)
    unmerge(model)
    for parameter in lora_parameters(model):
        if parameter.dim() > 1:
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.02 if parameter.any() else 0.1 / parameter.shape[1] ** 0.5))
    return model


@torch.no_grad()
def _off_is_base(model: nn.Module, batch: Any) -> list[str]:
    base = copy.deepcopy(model)
    eject(base)
    for parameter, original in zip(base.parameters(), _base_parameters(model), strict=True):
        parameter.requires_grad_(original.requires_grad)
    model.eval(), base.eval()
    with adapters_off(model):
        same = _equal(call(model, batch), call(base, batch))
    return [] if same else ["with adapters off the outputs are not the base model's"]


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    updates = update_ids(model)
    return [p for p in model.parameters() if id(p) not in updates]


def _gradients_arrive(model: nn.Module, batch: Any) -> list[str]:
    failures = []
    for mode in ("train", "eval"):
        model.train(mode == "train")
        model.zero_grad()
        _loss(model, batch).backward()
        if dead := dead_updates(model):
            failures.append(f"in {mode} mode no gradient reaches the updates of {listed(dead)}")
    return failures


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return torch.stack([t.float().square().mean() for t in call(model, batch)]).sum()


def _frozen_stays(model: nn.Module, batch: Any) -> list[str]:
    before = {n: t.clone() for n, t in _frozen(model).items()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    _loss(model, batch).backward()
    optimizer.step()
    changed = [n for n, tensor in _frozen(model).items() if not torch.equal(before[n], tensor)]
    return [f"frozen, but a training step changed {listed(changed)}"] if changed else []


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    injection = injection_of(model)
    frozen = {n: p.detach() for n, p in named_parameters(model).items() if not p.requires_grad}
    for name in injection.training:
        norm = submodule(model, name)
        frozen.update({f"{name}.{n}": b for n, b in norm.named_buffers(recurse=False)})
    return frozen


@torch.no_grad()
def _merged_is_unmerged(model: nn.Module, batch: Any) -> list[str]:
    model.eval()
    weights = {n: _bases(layer) for n, layer in lora_layers(model).items()}
    before = call(model, batch)
    merge(model)
    merged = call(model, batch)
    unmerge(model)
    failures = []
    for one, other in zip(before, merged, strict=True):
        allowed = 1e-5 if one.dtype in (torch.float32, torch.float64) else 1e-2
        error = (one - other).abs().max() / one.abs().max().clamp_min(1e-12)
        if not error <= allowed:
            failures.append(f"merged outputs differ from unmerged ones by {error:.1e}, allowed {allowed:.0e}")
    lost = [n for n, m in lora_layers(model).items() if not _equal(weights[n], _bases(m))]
    return [*failures, f"unmerging did not restore {listed(lost)}"] if lost else failures


def _bases(layer: LoRALayer) -> list[Tensor]:
    return [layer.base(name).detach().clone() for name in layer.properties]


def _equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
