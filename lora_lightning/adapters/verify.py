"""Checks that an adapted model is what it claims to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base_values import refuse_meta, refuse_replaced
from lora_lightning.adapters.eject import eject
from lora_lightning.adapters.manage import adapters_off, merge, unmerge
from lora_lightning.adapters.measure import run
from lora_lightning.adapters.state import state_of, update_of
from lora_lightning.layers.registry import LoRALayer, lora_layers, update_ids
from lora_lightning.utils.copying import copied
from lora_lightning.utils.names import named_parameters, own_buffers, submodule
from lora_lightning.utils.sharding import refuse_sharded
from lora_lightning.utils.tables import truncate_list


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
    state_of(model)
    refuse_sharded(model, "verify")
    refuse_replaced(model)
    refuse_meta(model, "verify")
    checks = (_off_is_base, _gradients_arrive, _frozen_stays, _merged_is_unmerged)
    return [failure for check in checks for failure in check(_randomized(model), example_batch)]


def gradient_peaks(model: nn.Module, reached: Set[int] | None = None) -> dict[str, float | None]:
    """The largest absolute gradient of each active update after a backward, by its name in the plan;
    with several adapters selected, with the adapter's name behind it.

    None: the backward gave it no gradient. At the start, when B is zero, A's gradient is zero in every
    layer; B's is not.

    Args:
        reached: identities of the parameters to which the model's own loss leads, where a term of the weights
            was added to it, which gives them all a gradient. While B is zero, that term gives B none.
    """
    state = state_of(model)
    peaks: dict[str, float | None] = {}
    for adapter in state.active:
        for planned in state.adapters[adapter].plan.layers:
            layer = cast(LoRALayer, submodule(model, planned.module))
            if adapter not in layer.lora_active:
                continue
            update = update_of(model, planned, adapter)
            looked: list[Any] = list(update.parameters())
            if reached is not None:
                own = (f"lora_{update.slot.zero}", "lora_magnitude", "lora_mixture")
                looked = [getattr(update, name, None) for name in own]
            grads = [p.grad for p in looked if p is not None and p.grad is not None]
            name = planned.name if len(state.active) == 1 else f"{planned.name} of {adapter}"
            peaks[name] = torch.stack([g.abs().max() for g in grads]).max().item() if grads else None
            if not peaks[name] and reached is not None and reached.isdisjoint(map(id, update.parameters())):
                peaks[name] = None
    return peaks


def dead_updates(model: nn.Module) -> list[str]:
    """Adapted layers that the last backward gave no gradient, or only zeros."""
    return [name for name, peak in gradient_peaks(model).items() if not peak]


def call(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors in the model's output for a batch, flattened from any nesting."""
    return [t for t in _tensors(run(model, batch)) if t.is_floating_point()]


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
    """A copy in which every update changes something: a fresh B is zero, a fresh head may be, and would hide
    a fault."""
    model = copied(model)
    unmerge(model)
    updates = update_ids(model)
    for parameter in model.parameters():
        if parameter.dim() > 1 and (
            id(parameter) in updates or (parameter.requires_grad and not parameter.any())
        ):
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.02 if parameter.any() else 0.1 / parameter.shape[1] ** 0.5))
    return model


@torch.no_grad()
def _off_is_base(model: nn.Module, batch: Any) -> list[str]:
    base = copied(model)
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
            failures.append(f"in {mode} mode no gradient reaches the updates of {truncate_list(dead)}")
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
    return [f"frozen, but a training step changed {truncate_list(changed)}"] if changed else []


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    state = state_of(model)
    frozen = {n: p.detach() for n, p in named_parameters(model).items() if not p.requires_grad}
    for name in state.training:
        frozen.update(own_buffers(name, submodule(model, name)))
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
    return [*failures, f"unmerging did not restore {truncate_list(lost)}"] if lost else failures


def _bases(layer: LoRALayer) -> list[Tensor]:
    return [layer.base_weight(name).detach().clone() for name in layer.properties]


def _equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
