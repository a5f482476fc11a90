"""How the tests look at a model: seeded runs, randomized gates, an independent W + s·B·A."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.utils._pytree import KeyPath, keystr, tree_map_with_path

import lora_lightning as ll
from lora_lightning.layers.registry import LoRALayer, lora_layers

from .zoo import ZOO

T = TypeVar("T")
CONFIG = ll.LoRAConfig(rank=2)  # alpha is 4, so that s = 2


@lru_cache(maxsize=4)
def _built(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO[name].build()
    open_gates(model)
    return model


def base(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo that nobody else holds."""
    return copy.deepcopy(_built(name, seed))


@torch.no_grad()
def open_gates(model: nn.Module) -> None:
    """Make constant parameters random: a LayerScale of 1e-5, a last BatchNorm's weight of zero or a
    zeroed projection would hide the update of every layer behind it."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.min() != parameter.max():
            continue
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
        elif parameter.abs().max() < 1e-3 and "bias" not in name:
            parameter.uniform_(0.05, 0.2)  # a gate; wide open, 60 blocks would saturate every softmax
        elif "bias" in name:
            parameter.normal_(std=0.1)
        else:
            parameter.uniform_(0.5, 1.5)


def adapted(name: str, model: nn.Module | None = None, seed: int = 3) -> nn.Module:
    """The model with updates that all change something."""
    model = base(name) if model is None else model
    ll.inject(model, CONFIG)
    return redrawn(model, seed)


@torch.no_grad()
def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """The same model with other updates."""
    torch.manual_seed(seed)
    for parameter in ll.lora_parameters(model):
        parameter.normal_(std=0.3 / max(parameter.shape[1:].numel(), 1) ** 0.5)
    return model


def batch(name: str, train: bool) -> Any:
    torch.manual_seed(1)
    architecture = ZOO[name]
    return architecture.train_batch() if train and architecture.train_batch else architecture.batch()


def run(
    name: str, model: nn.Module, train: bool, *, dtype: torch.dtype | None = None, double: bool = False
) -> list[Tensor]:
    """The floating-point tensors of the output, with the same random numbers in every call. The frozen
    normalization of an adapted model has its counterpart in the base's put into eval mode.

    Args:
        dtype: of autocast; None leaves it off.
        double: give the inputs in float64.
    """
    set_mode(model, train)
    inputs = doubled(batch(name, train)) if double else batch(name, train)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return call(model, inputs)


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors of the output, in whatever it nests them."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return [t for t in _tensors(output) if t.is_floating_point()]


def set_mode(model: nn.Module, train: bool) -> None:
    model.train(train)
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def loss(outputs: list[Tensor]) -> Tensor:
    """A random linear function of the outputs: of a normalized output a square would be constant."""
    generator = torch.Generator().manual_seed(4)
    return sum(
        ((t.float() * torch.randn(t.shape, generator=generator)).sum() / max(t.numel(), 1) for t in outputs),
        torch.zeros(()),
    )


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN (a masked row's softmax)."""
    return len(ones) == len(others) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(ones, others, strict=True)
    )


def distance(ones: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference as a part of the largest value, over all outputs."""
    assert [t.shape for t in ones] == [t.shape for t in others]
    errors = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(_floats(ones), _floats(others), strict=True)
        if a.numel()
    ]
    return max(errors)


def _floats(values: list[Tensor]) -> list[Tensor]:
    return [t.detach().double() for t in values]


def doubled(inputs: Any) -> Any:
    """A batch in float64."""
    return tree_map_with_path(_double, inputs)


def _double(path: KeyPath, value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    # torchvision takes keypoints in float32 alone
    return value.double() if is_float and "keypoints" not in keystr(path) else value


@contextmanager
def without(update: nn.Module) -> Iterator[None]:
    """One update switched off."""
    kept = update.lora_B.data.clone()
    update.lora_B.data.zero_()
    try:
        yield
    finally:
        update.lora_B.data.copy_(kept)


def updates(model: nn.Module) -> dict[str, nn.Module]:
    """Every update by the name of its layer, with its parameter's where a layer has several."""
    found = {}
    for name, layer in lora_layers(model).items():
        for update in layer.updates("default"):
            parameter = update.slot.parameter
            found[name if parameter == "weight" else f"{name}.{parameter}"] = update
    return found


@torch.no_grad()
def reference(name: str, model: nn.Module) -> nn.Module:
    """A plain model that has W + 2·B·A written into its weights, computed here and not by the library."""
    plain = base(name)
    for layer_name, layer in lora_layers(model).items():
        module = plain.get_submodule(layer_name)
        for update in layer.updates("default"):
            parameter = update.slot.parameter
            weight = getattr(module, parameter).detach()
            effective = weight + 2 * _product(layer, update.lora_A, update.lora_B, weight)
            if is_parametrized(module, parameter):
                remove_parametrizations(module, parameter)
            getattr(module, parameter).copy_(effective)
    return plain


def _product(layer: LoRALayer, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    if "ConvTranspose" in type(layer).__name__ or type(layer).__name__ == "LoRAConv1D":
        return torch.einsum("ri,ro...->io...", A, B)  # no zoo model groups a transposed convolution
    groups = getattr(layer, "groups", 1)
    if groups == 1 or groups == layer.in_channels:
        return torch.einsum("or,r...->o...", B, A)
    rank = B.shape[1]
    rows = weight.shape[0] // groups
    return torch.cat([
        torch.einsum("or,r...->o...", B[g * rows : (g + 1) * rows], A[g * rank : (g + 1) * rank])
        for g in range(groups)
    ])  # fmt: skip


def give_flags(model: nn.Module, like: nn.Module) -> nn.Module:
    """A weight's `requires_grad` alone can make torch choose another kernel, with and without gradients."""
    flags = {n: p.requires_grad for n, p in like.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    return model


class BaseFails(Exception):
    """The base model cannot do it either."""


def as_the_base_does(name: str, model: nn.Module, attempt: Callable[[nn.Module], T]) -> T:
    """What can be done with the adapted model.

    Raises:
        BaseFails: it cannot be done with the base model either.
    """
    try:
        return attempt(model)
    except Exception as failure:
        try:
            attempt(base(name))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise BaseFails(f"{type(error).__name__}: {lines[0][:120]}") from error
        raise failure


def tolerance(name: str, check: str, default: float) -> float:
    return ZOO[name].tolerances.get(check, (default, ""))[0]
