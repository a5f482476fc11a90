"""What a model is made of, read from the model alone: its targets, its head, its stem, its blocks."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lora_lightning.layers import LoRALayer, family_of, hidden_weight, refusal, slots_of
from lora_lightning.layers.reading import weight_of
from lora_lightning.layers.slot import Slot

# Attribute names under which timm, torchvision, torchaudio and transformers keep their output layers.
HEAD_NAMES = (
    "head", "heads", "head_dist", "fc", "classifier", "classification_head", "aux", "lm_head",
    "output_layer", "score",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A weight, or some of its rows, that can be adapted.

    Attributes:
        name: `blocks.0.attn.qkv`, `lstm.weight_ih_l0`, `self_attn.in_proj.q`.
        module: name of the module that holds it.
        slot_name: its slot there.
        kind: "linear", "convolution", "recurrent", "embedding" or "other".
    """

    name: str
    module: str
    slot_name: str
    slot: Slot
    kind: str
    shape: tuple[int, ...]
    family: type[LoRALayer]


def targets_of(model: nn.Module) -> tuple[dict[str, Target], dict[str, str]]:
    """What can be adapted, by name in the order of registration; and what cannot, with the reason."""
    targets: dict[str, Target] = {}
    refused: dict[str, str] = {}
    for module_name, module in model.named_modules():
        hidden = hidden_weight(module)
        slots = {} if hidden else slots_of(module_name, module)
        if reason := hidden or (refusal(module) if slots else None):
            refused[module_name] = reason
            continue
        for slot_name, slot in slots.items():
            name = ".".join(part for part in (module_name, slot_name) if part)
            shape = slot.shape(weight_of(module, slot.parameter))
            targets[name] = Target(
                name, module_name, slot_name, slot, _kind(module), shape, family_of(module)
            )
    return targets, refused


def _kind(module: nn.Module) -> str:
    if isinstance(module, _ConvNd):
        return "convolution"
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or type(module).__name__ == "Conv1D":
        return "linear"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent"
    return "embedding" if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else "other"


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


def inside(name: str, parents: Iterable[str]) -> bool:
    """Whether `name` is one of `parents` or lies below one."""
    return any(name == p or name.startswith(f"{p}.") for p in parents)


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
    targets, _ = targets_of(model.get_submodule(head))
    layers = [t.module for t in targets.values() if t.module]
    return f"{head}.{layers[-1]}" if layers else head


def _last_linear(model: nn.Module) -> list[str]:
    targets, _ = targets_of(model)
    modules = list(dict.fromkeys(t.module for t in targets.values()))
    outside = [
        n for n in modules if n and isinstance(model.get_submodule(n), nn.Linear) and not in_block(model, n)
    ]
    return outside[-1:] if len(modules) > 1 else []


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


def auto_targets(model: nn.Module, targets: Iterable[Target]) -> tuple[list[str], dict[str, str]]:
    """The targets that "auto" adapts among these (the head's are not), and why it leaves the others.

    A model whose weights lie mostly in the linear layers of its blocks (a transformer, ConvNeXt) gets
    those; a convolutional one gets every convolution but the stem, and the linear layers outside its
    blocks (VGG's); any other gets every linear layer. The weights of RNNs are adapted everywhere,
    embeddings nowhere.
    """
    whole = [t for t in targets if not t.slot.part]
    linear = [t for t in whole if t.kind == "linear"]
    convolutions = [t for t in whole if t.kind == "convolution"]
    blocks = [t for t in linear if in_block(model, t.module)]
    if _size(blocks) > _size(convolutions):
        chosen = blocks
        left = {
            t.name: "outside the blocks" if t in linear else "most weights are in linear layers"
            for t in whole
        }
    elif convolutions:
        stem = _stem(convolutions)
        chosen = [t for t in [*linear, *convolutions] if t not in stem and t not in blocks]
        left = {t.name: "the stem" if t in stem else "most weights are in convolutions" for t in whole}
    else:
        chosen, left = linear, {t.name: "" for t in whole}
    names = {t.name for t in [*chosen, *(t for t in whole if t.kind == "recurrent")]}
    left.update({t.name: f"{t.kind}: not chosen by auto" for t in whole if t.kind in ("embedding", "other")})
    return [t.name for t in whole if t.name in names], {n: r for n, r in left.items() if n not in names}


def _size(targets: Iterable[Target]) -> int:
    return sum(prod(t.shape) for t in targets)


def _stem(convolutions: list[Target]) -> list[Target]:
    """The first convolution, and its neighbours in a stem of several (ResNet-D's conv1.0, conv1.3):
    the widest part of the model around the first that holds under 5 % of the weights."""
    if len(convolutions) < 2:
        return []
    parts = convolutions[0].module.split(".")
    stem = convolutions[:1]
    for depth in range(len(parts), 0, -1):
        wider = [t for t in convolutions if inside(t.module, [".".join(parts[:depth])])]
        if _size(wider) < 0.05 * _size(convolutions):
            stem = wider
    return stem
