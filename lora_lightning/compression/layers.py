"""Which layers of a model can be compressed, why the others cannot, and how one takes another's place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lora_lightning.compression.form import Layer, Rank
from lora_lightning.compression.forms import FORMS
from lora_lightning.compression.held import Held, hold
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.kernels.quantized_tensor import is_quantized
from lora_lightning.layers.attention import attention_slots
from lora_lightning.layers.registry import DTYPES, hidden_weight, lora_layers
from lora_lightning.layers.swap import class_of
from lora_lightning.planning.patterns import matching
from lora_lightning.utils.names import joined, named_modules, named_parameters, submodule
from lora_lightning.utils.tables import truncate_list

BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
COMPUTED = "its weight is computed by a parametrization or a hook"
READ = "what holds it reads its weight, and does not call it"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layers_of(model: nn.Module, exclude: str | Iterable[str]) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be compressed by name, and why the other linear layers and convolutions are left.

    Raises:
        ConfigError: a pattern of `exclude` means no layer.
    """
    found = _weights_of(model)
    problems: list[str] = []
    patterns = exclude if isinstance(exclude, str) else list(exclude)
    recurrent = (n for n, m in named_modules(model).items() if isinstance(m, nn.RNNBase))
    named = dict.fromkeys([*found, *recurrent])
    excluded = set(matching("exclude", patterns, named, problems)) if patterns else set()
    if problems:
        raise ConfigError(problems)
    sharers: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, all_names=True).items():
        sharers.setdefault(id(parameter), []).append(name)
    every = named_modules(model, all_names=True)
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for name, held in found.items():
        module = held.module
        others = sharers.get(id(module._parameters.get(held.parameter)), [])
        tied = [n for n in others if every[n.rpartition(".")[0]] is not module]
        reason = "excluded" if name in excluded else _reason(held)
        if reason is None and tied:
            reason = f"shares its weight with {truncate_list(tied, most=1)}"
        if reason is None and not held.slot and _is_read(model, name):
            if isinstance(module, nn.Linear):
                layers[name] = held
                continue
            reason = READ
        if reason is None:
            layers[name] = held if held.slot else cast(Layer, module)
        else:
            left[name] = reason
    return layers, left


def _weights_of(model: nn.Module) -> dict[str, Held]:
    """Every linear layer, convolution and table of embeddings, and the projections of attention."""
    found = {}
    for name, module in named_modules(model).items():
        if isinstance(module, (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag)):
            found[name] = Held(module, name, "", "weight")
        elif isinstance(module, nn.MultiheadAttention):
            for slot, about in attention_slots(module).items():
                if not about.part:
                    found[joined(name, slot)] = Held(module, name, slot, about.parameter)
    return found


def _reason(held: Held) -> str | None:
    """Why a layer is left as it is, or None."""
    module = held.module
    if held.slot:
        if is_parametrized(module, held.parameter):
            return COMPUTED
        return _reason_of(held)
    base = next((b for b in BASES if isinstance(module, b)), None)
    if not held.name:
        return "it is the model itself: put it into nn.Sequential"
    if base is None:
        return f"a {type(module).__name__}, for which there is no form"
    if (groups := getattr(module, "groups", 1)) > 1:
        return "depthwise" if groups == module.in_channels else f"a convolution in {groups} groups"
    kind = class_of(module)
    if any(
        getattr(kind, f) is not getattr(base, f) for f in ("forward", "_conv_forward") if hasattr(base, f)
    ):
        return f"{type(module).__name__} computes in a way of its own"
    if is_parametrized(module) or hidden_weight(module) or "weight" not in module._parameters:
        return COMPUTED
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which would be lost"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites its weight in every forward"
    return _reason_of(held)


def _reason_of(held: Held) -> str | None:
    """Why a matrix is left as it is, or None."""
    weight = held.weight
    if isinstance(weight, nn.UninitializedParameter):
        return "its shape is not known yet: run one batch through the model first"
    if is_quantized(weight) or weight.dtype not in DTYPES:
        return "its weight is quantized"
    return None


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the class that holds a layer reads its weight or its bias, as attention does."""
    holder, _, leaf = name.rpartition(".")
    source = _source(cast(Hashable, type(submodule(model, holder))))
    return re.search(rf"\.{re.escape(leaf)}\.(weight|bias)\b", source) is not None


@cache
def _source(kind: Hashable) -> str:
    """The text of a class's methods, but for those that give weights their first values."""
    texts = []
    assert isinstance(kind, type)
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and "init" not in name and "reset" not in name:
                try:
                    texts.append(inspect.getsource(method))
                except (OSError, TypeError):  # made where no file has its text
                    continue
    return "\n".join(texts)


def empty(layer: Layer, form: str, rank: Rank) -> nn.Sequential:
    """What takes a layer's place, without values: its flags and its bias are the layer's."""
    modules = nn.Sequential(*FORMS[form].modules(layer, rank))
    for module in modules:
        cast(nn.Parameter, module.weight).requires_grad_(layer.weight.requires_grad)
    if (bias := getattr(layer, "bias", None)) is not None:
        modules[-1].bias = bias
    return modules.train(layer.training)


def put(
    model: nn.Module, layers: Mapping[str, nn.Module | Held], replacements: Mapping[str, nn.Module]
) -> None:
    """Put modules in the places of the layers of these names, wherever they stand."""
    new: dict[Any, nn.Module] = {}
    for name, modules in replacements.items():
        layer = layers[name]
        if isinstance(layer, Held):
            hold(layer, cast(nn.Sequential, modules))
        else:
            new[layer] = modules
    for holder in list(model.modules()):  # wrappers too, which hold what they wrap
        for leaf, child in holder._modules.items():
            if child in new:
                holder._modules[leaf] = new[child]


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model with an adapter, whose updates belong to the layers as they are.

    Raises:
        UserError: it has one.
    """
    if lora_layers(model):
        raise UserError(
            "compress: the model has an adapter. Give it its place in the weights first, "
            "eject(model, merged=True), or compress the plain model and inject into that."
        )
