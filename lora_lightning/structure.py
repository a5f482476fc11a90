"""What a model is made of, read from the model alone: its head, its stem, its blocks, its norms."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lightning.layers import family_of, refusal

# Attribute names under which timm, torchvision, torchaudio and transformers keep their output layers.
HEAD_NAMES = (
    "head", "heads", "head_dist", "fc", "classifier", "classification_head", "aux", "lm_head",
    "output_layer", "score",
)  # fmt: skip


def matches(name: str, patterns: str | list[str]) -> bool:
    """Whether a dotted name is meant: a string is a regular expression for the whole name, a list
    holds suffixes (`qkv`, `attn.qkv`) or globs (`blocks.*.fc?`)."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(_matches_one(name, pattern) for pattern in patterns)


def _matches_one(name: str, pattern: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def inside(name: str, parents: list[str]) -> bool:
    """Whether `name` is one of `parents` or lies below one."""
    return any(name == p or name.startswith(f"{p}.") for p in parents)


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that a family can adapt, by name, in the order of registration."""
    return {name: m for name, m in model.named_modules() if name and refusal(m) is None}


def weight_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a weight matrix or tensor of their own (2-D or more), parametrized ones included."""
    for name, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None}
        if is_parametrized(module) or any("weight" in n and _is_matrix(p) for n, p in own.items()):
            yield name, module


def _is_matrix(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.UninitializedParameter) or parameter.dim() >= 2


def find_heads(model: nn.Module) -> list[str]:
    """Names of the output layers: timm's `get_classifier`, else the usual attribute names, else the
    last linear layer that stands outside the blocks. Empty when there is none."""
    return _declared_heads(model) or _named_heads(model) or _last_linear(model)


def _declared_heads(model: nn.Module) -> list[str]:
    for module in model.modules():
        declared = getattr(module, "get_classifier", None)
        if callable(declared):
            heads = declared()
            heads = heads if isinstance(heads, (tuple, list)) else [heads]
            return [n for n, m in model.named_modules() if any(m is h for h in heads) and _holds(m)]
    return []


def _named_heads(model: nn.Module) -> list[str]:
    heads: list[str] = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in HEAD_NAMES and _holds(module) and not in_block(model, name) and not inside(name, heads):
            heads.append(name)
    return [_output_layer(model, name) for name in heads]


def _output_layer(model: nn.Module, head: str) -> str:
    """The last layer of a head that is a stack: VGG's classifier holds most of its parameters."""
    if not isinstance(model.get_submodule(head), nn.Sequential):
        return head
    layers = [n for n, m in model.get_submodule(head).named_modules() if family_of(m)]
    return f"{head}.{layers[-1]}" if layers else head


def _last_linear(model: nn.Module) -> list[str]:
    layers = adaptable(model)
    linears = [n for n, m in layers.items() if isinstance(m, nn.Linear) and not in_block(model, n)]
    return linears[-1:] if len(layers) > 1 else []


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def in_block(model: nn.Module, name: str) -> bool:
    """Whether a layer lies in a block: a module with children inside a Sequential or ModuleList."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        parent = model.get_submodule(".".join(parts[:i]))
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            return True
    return isinstance(model, (nn.Sequential, nn.ModuleList)) and len(parts) > 1


def auto_targets(model: nn.Module, heads: list[str]) -> tuple[list[str], dict[str, str]]:
    """The layers that "auto" adapts, and why it leaves the others.

    A model whose weights lie mostly in the linear layers of its blocks (a transformer, ConvNeXt) gets
    those; a convolutional one gets every convolution but the stem, and the linear layers outside its
    blocks (VGG's); any other gets every linear layer. Heads are left: they train in full.
    """
    layers = {n: m for n, m in adaptable(model).items() if not inside(n, heads)}
    linears = [n for n, m in layers.items() if isinstance(m, nn.Linear)]
    convolutions = [n for n, m in layers.items() if isinstance(m, nn.Conv2d)]
    blocks = [n for n in linears if in_block(model, n)]
    if _weights(layers[n] for n in blocks) > _weights(_convolutions(model)):
        chosen = blocks
        left = {n: "outside the blocks" if n in linears else "most weights are in linear layers" for n in layers}
    elif convolutions:
        stem = _stem(model, convolutions)
        chosen = [n for n in layers if n not in stem and n not in blocks]
        left = {n: "the stem" if n in stem else "most weights are in convolutions" for n in layers}
    else:
        chosen, left = linears, {}
    return chosen, {n: reason for n, reason in left.items() if n not in chosen}


def _convolutions(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))


def _weights(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for m in modules for n, p in m.named_parameters(recurse=False) if "bias" not in n)


def _stem(model: nn.Module, convolutions: list[str]) -> list[str]:
    """The first convolution, and its neighbours in a stem of several (ResNet-D's conv1.0, conv1.3):
    the widest part of the model around the first that holds under 5 % of the weights."""
    if len(convolutions) < 2:
        return []
    size = {n: model.get_submodule(n)._parameters["weight"].numel() for n in convolutions}  # type: ignore[union-attr]
    parts = convolutions[0].split(".")
    stem = convolutions[:1]
    for depth in range(len(parts), 0, -1):
        wider = [n for n in convolutions if inside(n, [".".join(parts[:depth])])]
        if sum(size[n] for n in wider) < 0.05 * sum(size.values()):
            stem = wider
    return stem
