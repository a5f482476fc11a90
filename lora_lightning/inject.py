"""From a plan to an adapted model: layers swapped in place, the rest frozen; and all the way back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.layers import family_of, lora_layers, slots_of
from lora_lightning.layers.layer import adapt, restore, set_weights, slot_key
from lora_lightning.layers.norm import FrozenNorm, freeze_statistics, has_statistics
from lora_lightning.layers.reading import weight_of
from lora_lightning.layers.swap import swap_out
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.sharding import refuse_sharded
from lora_lightning.structure import inside
from lora_lightning.targets import Plan, inside_scope, plan, plan_probe, trained_names


WHOLE = "Save the adapter and load it into a whole model: docs/distributed.md shows how."


@dataclass
class Injection:
    """What was done to a model, kept on it as `model.lora_injection`.

    Attributes:
        originals: values before training of the model's own tensors that train inside the backbone
            (heads, norms, biases, running statistics), by name.
        requires_grad: the flag of every parameter before.
        training: the mode before of every norm layer that was frozen.
    """

    config: LoRAConfig
    plan: Plan
    adapter: str
    originals: dict[str, Tensor] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)


def inject(model: nn.Module, config: LoRAConfig | None = None, adapter: str = "default") -> Plan:
    """Adapt `model` in place: give the planned layers low-rank updates and freeze the rest.

    The outputs do not change. The model's objects, the names in its `state_dict()` and its hooks stay;
    the new parameters are `<layer>.lora.<adapter>.lora_A` and `lora_B`.

    Args:
        model: any module that is not adapted yet.
        config: None takes the defaults.
        adapter: name of the updates, an identifier.

    Returns:
        The plan that was carried out; `print` it for a table.

    Raises:
        ConfigError: as `plan`; the model is untouched.
    """
    config = config or LoRAConfig()
    planned = plan(model, config)
    carry_out(model, config, planned, adapter)
    return planned


def carry_out(model: nn.Module, config: LoRAConfig, planned: Plan, adapter: str = "default") -> None:
    """`inject` by a plan that is known already, for example from a file.

    Raises:
        ConfigError: the adapter's name is no identifier; the model is untouched.
        UserError: the model is sharded.
    """
    refuse_sharded(model, "inject", "Inject first, then shard: updates made now would not be kept in step.")
    if not adapter.isidentifier() or hasattr(nn.ModuleDict, adapter):
        raise ConfigError([f"adapter={adapter!r}: give an identifier, such as 'default' or 'scottish'."])
    if config.use_dora and any(p.is_meta for p in model.parameters()):
        raise ConfigError([
            "use_dora=True: magnitudes begin as the norms of the weights, which a model on the meta device "
            "does not have yet: give it memory and load its weights first, or set use_dora to false."
        ])  # fmt: skip
    injection = _freeze(model, config, planned, adapter)
    updates: dict[str, dict[str, LowRankUpdate]] = {}
    for item in planned.layers:
        module = model.get_submodule(item.module)
        slot = slots_of(item.module, module)[item.slot]
        updates.setdefault(item.module, {})[slot_key(item.slot)] = LowRankUpdate(
            slot.of(weight_of(module, slot.parameter)),
            slot,
            rank=item.rank,
            scaling=config.scaling(item.rank, item.alpha),
            dropout=config.dropout,
            init=config.init,
            use_dora=config.use_dora,
        )
    for name, slots in updates.items():
        module = model.get_submodule(name)
        adapt(module, family_of(module), slots, adapter)
    model.lora_injection = injection  # type: ignore[assignment]


def freeze(model: nn.Module, config: LoRAConfig | None = None) -> Plan:
    """Freeze the backbone and train the head alone: the linear probe. `eject` undoes it.

    Args:
        config: of its fields, `modules_to_save`, `backbone`, `train_bias` and `train_norm` count.

    Raises:
        ConfigError: no head is found.
    """
    config = config or LoRAConfig()
    planned = plan_probe(model, config)
    model.lora_injection = _freeze(model, config, planned, "")  # type: ignore[assignment]
    return planned


def eject(model: nn.Module, *, merged: bool = False) -> None:
    """Give back the model of before: its classes, `requires_grad` flags and values.

    Args:
        merged: keep what was trained: the updates are added to the weights, heads and norms keep
            their trained values. The result is a plain model that needs nothing of this package.

    Raises:
        UserError: the model is not adapted or sharded, or an update to be merged is not finite.
    """
    injection = injection_of(model)
    refuse_sharded(model, "eject", WHOLE)
    weights = {n: layer.merged_weights() for n, layer in lora_layers(model).items()} if merged else {}
    for name, layer in lora_layers(model).items():
        if layer.merged:
            layer.unmerge_updates()
        restore(layer)
        if merged:
            set_weights(layer, weights[name])
    modules = dict(model.named_modules())
    for name, mode in injection.training.items():
        if isinstance(norm := modules.get(name), FrozenNorm):
            swap_out(norm)
            norm.training = mode and model.training  # a model in eval mode stays in it
    if not merged:
        swap_originals(model, injection)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(injection.requires_grad.get(name, parameter.requires_grad))
    del model.lora_injection


def injection_of(model: nn.Module) -> Injection:
    """The record that `inject` left on the model.

    Raises:
        UserError: there is none.
    """
    injection = model.__dict__.get("lora_injection")
    if not isinstance(injection, Injection):
        raise UserError(
            f"{type(model).__name__} is not an adapted model: call lora_lightning.inject(model) first, "
            "or pass the very module that was given to it (with LoRACallback, the LightningModule)."
        )
    return injection


def swap_originals(model: nn.Module, injection: Injection) -> None:
    """Exchange the trained values of heads, norms and biases with those of before; twice is nothing."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in injection.originals.keys() & tensors.keys():
            tensor, original = tensors[name], injection.originals[name]
            injection.originals[name] = tensor.data
            tensor.data = original.to(tensor.device, tensor.dtype)


def freeze_norms(model: nn.Module) -> None:
    """Put frozen norm layers back into eval mode where another tool has replaced them (SyncBatchNorm)."""
    for name in injection_of(model).training:
        freeze_statistics(model.get_submodule(name))


def _freeze(model: nn.Module, config: LoRAConfig, planned: Plan, adapter: str) -> Injection:
    trained = trained_names(model, config, planned.scope, planned.heads, [p.module for p in planned.layers])
    injection = Injection(config, planned, adapter)
    for name, parameter in model.named_parameters():
        injection.requires_grad[name] = parameter.requires_grad
        parameter.requires_grad_(name in trained)
        if name in trained and inside_scope(name, planned.scope):
            injection.originals[name] = parameter.detach().clone()
    for name, module in model.named_modules():
        if not has_statistics(module) or not inside_scope(name, planned.scope):
            continue
        if inside(name, planned.heads) or config.train_norm in ("stats", "both"):
            buffers = {f"{name}.{n}": b for n, b in module.named_buffers(recurse=False)}
            injection.originals.update({n: b.detach().clone() for n, b in buffers.items()})
        else:
            injection.training[name] = module.training
            freeze_statistics(module)
    return injection


def is_injected(model: nn.Module) -> bool:
    """Whether `inject` or `freeze` was called on this very module."""
    return isinstance(model.__dict__.get("lora_injection"), Injection)
