"""What trains in a module as groups for an optimizer: which parameter gets which rate and which decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.methods.layer_rates import layers_of
from lora_lightning.methods.pairs import factor_ids, pairs_of
from lora_lightning.methods.rates import Rates
from lora_lightning.planning.heads import find_heads
from lora_lightning.utils.checks import options_of
from lora_lightning.utils.names import submodule


@options_of(Rates)
def param_groups(
    module: nn.Module, head: Iterable[nn.Parameter] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """What trains in `module` as groups for any optimizer of torch's kind, in the order of its parameters.

        def configure_optimizers(self):
            return torch.optim.AdamW(ll.param_groups(self, lr=1e-3, head_lr=1e-4, weight_decay=0.05))

    Updates of this package and of PEFT, biases, norms and whatever else has fewer than two dimensions are not
    decayed. With `layer_decay` each layer has groups of its own, "backbone.00" the first, counted as timm
    counts in its models and by the model's blocks elsewhere.

    With `lora_plus` (LoRA+, Hayou et al. 2024, arXiv 2402.12354) the rate of B is λ·`lr` and that of A `lr`:
    A sums over the inputs, as many as the layer is wide, B over the rank alone, so that steps of the same
    size move the outputs by A far more. It goes by this role and not by which factor begins at zero. In
    transposed convolutions B is the output's factor too. An embedding's A is looked up and sums over nothing:
    both of its factors keep `lr`, and so do DoRA's magnitudes, norms and biases.

    Args:
        module: the LightningModule, or any module; adapted or not.
        head: its output layers' parameters; None finds them by timm's `get_classifier` or the structure.
        **options: the fields of `lora_lightning.methods.rates.Rates`: `lr`, `head_lr`, `weight_decay`,
            `layer_decay`, `lora_plus`.

    Returns:
        Groups with "name", "params", "lr" and "weight_decay", sorted by name: "backbone", "head", each of
        them with "_B" behind for LoRA+ and "_no_decay" for what is not decayed; empty ones are left out. The
        order depends on the module and the options alone, as resuming an optimizer's state needs it.

    Raises:
        ConfigError: bad options; nothing trains; `head_lr`, and no part of the head trains; `layer_decay`,
            and no blocks are found; `lora_plus`, and no update trains.
    """
    if found := Rates.problems(options):
        raise ConfigError(found)
    return groups_of(module, head_parameters(module) if head is None else head, Rates(**options))


def head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the output layers, by timm's `get_classifier` or the model's structure."""
    return {p for name in find_heads(model) for p in submodule(model, name).parameters()}


def groups_of(module: nn.Module, head: Iterable[nn.Parameter], rates: Rates) -> list[dict[str, Any]]:
    """As `param_groups`.

    Raises:
        ConfigError: as `param_groups`, but for bad options.
    """
    layers, last = _layers(module, rates)
    heads, updates = {id(p) for p in head}, factor_ids(module)
    faster = {id(pair.B) for pair in pairs_of(module) if not pair.looked_up} if rates.lora_plus else set()
    groups: dict[str, dict[str, Any]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        name, lr, decay = "head", rates.head_lr or rates.lr, rates.weight_decay
        if id(parameter) not in heads:
            name, lr = "backbone", rates.lr
            if rates.layer_decay is not None:
                layer = layers[id(parameter)]
                name, lr = f"backbone.{layer:02}", lr * rates.layer_decay ** (last - layer)
        if id(parameter) in faster:
            name, lr = f"{name}_B", lr * (rates.lora_plus or 1)
        if id(parameter) in updates or parameter.ndim < 2:
            name, decay = f"{name}_no_decay", 0.0
        new = {"name": name, "params": [], "lr": lr, "weight_decay": decay}
        groups.setdefault(name, new)["params"].append(parameter)
    _refuse_unused(module, groups, rates)
    return [groups[name] for name in sorted(groups)]


def _refuse_unused(module: nn.Module, groups: Iterable[str], rates: Rates) -> None:
    """Refuse that nothing trains, or nothing of what an option is for."""
    name, problems = type(module).__name__, []
    if not groups:
        raise ConfigError([f"no parameter of {name} requires a gradient: adapt it first."])
    if rates.head_lr is not None and not any("head" in group for group in groups):
        problems.append(
            f"head_lr={rates.head_lr}: no head trains in {name}: none is found, or it is frozen. Give "
            "head_lr=null."
        )
    if rates.lora_plus is not None and not any(group.partition("_")[2].startswith("B") for group in groups):
        problems.append(
            f"lora_plus={rates.lora_plus:g}: no update with a lora_B trains in {name}. Adapt it first, or "
            "give lora_plus=null."
        )
    if problems:
        raise ConfigError(problems)


def _layers(module: nn.Module, rates: Rates) -> tuple[dict[int, int], int]:
    """As `layers_of`, where the rate depends on it."""
    if rates.layer_decay is None:
        return {}, 0
    layers, last = layers_of(module)
    if last < 2:
        problem = (
            f"layer_decay={rates.layer_decay}: no blocks are found in {type(module).__name__}. Give null."
        )
        raise ConfigError([problem])
    return layers, last
