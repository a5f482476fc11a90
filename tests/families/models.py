"""Models made of the cases, and the reference maths that every case is held against."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers

from .case import Case
from .convolutions import CONV, TRANSPOSED
from .general import GENERAL
from .sequences import ATTENTION, EMBEDDING, RECURRENT

CASES: dict[str, Case] = {**CONV, **TRANSPOSED, **EMBEDDING, **ATTENTION, **RECURRENT, **GENERAL}


class Model(nn.Module):
    """A model of one layer. It knows its case by name, so that it pickles."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = CASES[name].layer()

    def layer_dtype(self) -> torch.dtype:
        return next(self.layer.parameters()).dtype

    def forward(self, *inputs: Tensor) -> Any:
        return CASES[self.name].call(self.layer, *inputs)


def config(name: str, **options: Any) -> ll.LoRAConfig:
    case = CASES[name]
    settings = {"rank": 2, "target_modules": list(case.targets), "modules_to_save": None}
    return ll.LoRAConfig(**{**settings, **case.options, **options})


def base_model(name: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(name).to(dtype)


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """A model whose updates all change something."""
    model = base_model(name, dtype)
    ll.inject(model, config(name, **options))
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every update values; the row of `padding_idx`, which never trains, keeps its zero."""
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        padding = getattr(layer, "padding_idx", None)
        for parameter in layer.lora.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(1.2)  # DoRA's magnitude
        if padding is not None:
            layer.lora["default"]["weight"].lora_A[:, padding] = 0


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The float outputs, with the same random numbers in every call."""
    torch.manual_seed(7)
    return list(floats(model(*inputs)))


def floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from floats(item)


def loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs]).sum()


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def same_flags(name: str, model: nn.Module) -> nn.Module:
    """The base model with the `requires_grad` flags of the adapted one: flags alone can make torch take
    another kernel, with and without gradients."""
    base = base_model(name, model.layer_dtype())
    own = {n: p for n, p in model.named_parameters() if ".lora." not in n}
    for parameter_name, parameter in base.named_parameters():
        parameter.requires_grad_(own[parameter_name].requires_grad)
    return in_mode(base, model.training)


def in_mode(base: nn.Module, train: bool) -> nn.Module:
    """The base model in a mode, as the frozen one is in it: its spectral norms do not iterate."""
    base.train(train)
    for module in base.modules():
        if isinstance(module, _SpectralNorm):
            module.eval()
    return base


def reference(name: str, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """An independent plain model, and the weights W + s·B·A (times DoRA's factors) to put into it.

    Written here with sums over the indices, not with the package's code; the weights are functions of
    the adapted model's A and B, so that gradients reach these.
    """
    plain = base_model(name, model.layer_dtype()).requires_grad_(False).eval()
    for module in list(plain.modules()):
        if is_parametrized(module):
            for parameter in list(module.parametrizations):
                remove_parametrizations(module, parameter)
                setattr(module, parameter, nn.Parameter(getattr(module, parameter), requires_grad=False))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # sums have no sparse gradients
    weights: dict[str, Tensor] = {}
    for layer_name, layer in lora_layers(model).items():
        for update in layer.lora["default"].values():
            slot = update.slot
            key = f"{layer_name}.{slot.parameter}"
            W = weights.get(key, plain.get_parameter(key).detach())
            first, last = slot.out_range or (0, W.shape[0])
            rows = slice(first, last)
            rank = update.rank
            scaling = 2 * (8 / rank) ** 0.5 if model.lora_state.config.use_rslora else 2
            product = scaling * by_groups(update.lora_A, update.lora_B, rank, slot.transposed)
            if update.lora_fixed_A is not None:
                fixed = update.lora_fixed_A, update.lora_fixed_B, update.fixed
                product = product + scaling * by_groups(*fixed, slot.transposed)
            changed = W[rows] + product.reshape(W[rows].shape)
            if update.lora_magnitude is not None:
                norms = changed.detach().pow(2).flatten(1).sum(1).sqrt()
                shape = (-1, *[1] * (W.dim() - 1))
                changed = changed * (update.lora_magnitude / norms).view(shape)
            weights[key] = torch.cat([W[:first], changed, W[last:]])
    return plain, weights


def by_groups(A: Tensor, B: Tensor, rank: int, transposed: bool) -> Tensor:
    """Each group's product of its own r rows of A and its own share of B, one under the other."""
    groups = A.shape[0] // rank
    parts = []
    for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True):
        if transposed:
            parts.append(torch.einsum("ri,ro->io", a.flatten(1), b.flatten(1)))
        else:
            parts.append(torch.einsum("or,ri->oi", b, a.flatten(1)))
    return torch.cat(parts)


def reference_run(
    plain: nn.Module, weights: dict[str, Tensor], inputs: tuple[Tensor, ...], train: bool
) -> list[Tensor]:
    plain.train(train)
    torch.manual_seed(7)
    return list(floats(torch.func.functional_call(plain, weights, inputs)))


def pickled_if_possible(model: Model) -> nn.Module:
    if "-norm" in model.name:  # torch forbids pickling what has a parametrization
        return copy.deepcopy(model)
    return pickle.loads(pickle.dumps(model))


def check_merging(model: Model, inputs: tuple[Tensor, ...], allowed: float) -> None:
    """Merged it is unmerged to a part of the largest output, and unmerging restores it, a copy's too."""
    dtype = model.layer_dtype()
    with torch.no_grad():
        before, weights = run(model, inputs), _weights_of(model)
        ll.merge(model)
        merged = run(model, inputs)
        assert {p.dtype for n, p in model.named_parameters() if ".lora." not in n} == {dtype}
        for restored in (pickled_if_possible(model), model):
            ll.unmerge(restored)
            assert equal(_weights_of(restored), weights)
            assert equal(run(restored, inputs), before)
    for one, other in zip(before, merged, strict=True):
        assert (one - other).abs().max() <= allowed * one.abs().max()


def _weights_of(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]
