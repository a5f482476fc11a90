"""What a model is made of, read from the model alone: its targets, its head, its stem, its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from lora_lightning.layers.registry import LoRALayer, family_of, hidden_weight, refusal, slots_of
from lora_lightning.layers.slot import Slot, read_weight
from lora_lightning.utils.names import inside, joined, named_children, named_modules, submodule

# wav2vec 2.0's feature extractor has seven layers, the features of VGG-11 eight.
LONG = 8

# Input of a stem: images, pictures with an alpha channel or depth, stereo sound.
RAW_CHANNELS = 4

INSIDE = "computes another layer's weight: adapt that layer"

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
    modules = named_modules(model)
    computing = [name for name, module in modules.items() if isinstance(module, ParametrizationList)]
    for module_name, module in modules.items():
        hidden = hidden_weight(module)
        slots = {} if hidden else slots_of(module_name, module)
        within = INSIDE if inside(module_name, computing) else None  # its inputs are no samples
        if reason := hidden or (within or refusal(module) if slots else None):
            refused[module_name] = reason
            continue
        for slot_name, slot in slots.items():
            name = joined(module_name, slot_name)
            shape = slot.shape(read_weight(module, slot.parameter))
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


def in_block(model: nn.Module, name: str) -> bool:
    """Whether a layer lies in a block: a module with children inside a Sequential or ModuleList."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        parent = submodule(model, ".".join(parts[:i]))
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            return True
    return isinstance(model, (nn.Sequential, nn.ModuleList)) and len(parts) > 1


def embedding_weights(model: nn.Module) -> set[int]:
    """Identities of the tables of the model's embeddings, to which an output layer may be tied."""
    tables = (m._parameters.get("weight") for m in model.modules() if isinstance(m, nn.Embedding))
    return {id(table) for table in tables if table is not None}


def auto_targets(model: nn.Module, targets: Iterable[Target]) -> tuple[list[str], dict[str, str]]:
    """The targets that "auto" adapts among these (the head's are not), and why it leaves the others.

    Linear layers, convolutions and the weights of RNNs are adapted from the first block on. What stands
    before the blocks (a patch embedding, a speech encoder's feature extractor and its projection) and
    the stem stay frozen, and so do embeddings with the output layer tied to them. In a model without
    blocks (a plain MLP, DeepSpeech) only the stem is left.
    """
    whole = [t for t in targets if not t.slot.part]
    layers = [t for t in whole if t.kind in ("linear", "convolution")]
    embedded = embedding_weights(model)
    front = _front(model, layers)
    stem = _stem(model, [t for t in layers if t.kind == "convolution"])
    before = "the stem" if all(t.kind == "convolution" for t in front) else "before the blocks"
    left = {**{t.name: "the stem" for t in stem}, **{t.name: before for t in front}}
    for target in whole:
        if target.kind in ("embedding", "other"):
            left[target.name] = f"{target.kind}: not chosen by auto"
        elif id(submodule(model, target.module)._parameters.get(target.slot.parameter)) in embedded:
            left[target.name] = "tied to an embedding"
    return [t.name for t in whole if t.name not in left], {
        t.name: left[t.name] for t in whole if t.name in left
    }


def _front(model: nn.Module, layers: list[Target]) -> list[Target]:
    """Those before the first block of the smallest part of the model that holds them and blocks."""
    position = {name: i for i, name in enumerate(named_modules(model))}
    blocks, flat = _blocks(model, [t.module for t in layers])
    front = []
    for target in layers:
        if inside(target.module, [*blocks, *flat]):
            continue
        parts = target.module.split(".")
        parents = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
        parts_with_blocks = ([b for b in blocks if inside(b, [parent])] for parent in parents)
        beneath = next((part for part in parts_with_blocks if part), [*blocks, *flat])
        if beneath and position[target.module] < min(position[b] for b in beneath):
            front.append(target)
    return front


def _blocks(model: nn.Module, layers: list[str]) -> tuple[list[str], list[str]]:
    """The elements of lists that hold several layers; and the elements of one layer each where they
    make a long list (VGG's features, unlike the extractor of wav2vec 2.0 or a stem)."""
    blocks: list[str] = []
    flat: list[str] = []
    for name, module in named_modules(model).items():
        if not isinstance(module, LISTS):
            continue
        elements = [joined(name, n) for n in named_children(module)]
        sizes = {e: sum(inside(n, [e]) for n in layers) for e in elements}
        several = [e for e in elements if sizes[e] > 1]
        if len(several) == 1 and _holds_blocks(submodule(model, several[0])):
            continue  # nn.Sequential(backbone, head)
        blocks += several
        if not several and sum(sizes.values()) >= LONG:
            flat += elements
    return blocks, flat


def blocks_in_order(model: nn.Module) -> list[str]:
    """The blocks in the order of registration, a stage of blocks taken apart: a ResNet's, a transformer's."""
    layers = [name for name, module in named_modules(model).items() if slots_of(name, module)]
    blocks, flat = _blocks(model, layers)
    found = [*blocks, *(name for name in flat if any(inside(layer, [name]) for layer in layers))]

    def parts(among: list[str]) -> list[str]:
        outer = [n for n in among if not inside(n, [o for o in among if o != n])]
        return [part for name in outer for part in apart(name, [n for n in among if inside(n, [name])])]

    def apart(name: str, among: list[str]) -> list[str]:
        """A block, or the blocks within it where they hold most of its layers: a squeeze-and-excitation does
        not."""
        within = [n for n in among if n != name]
        own = [layer for layer in layers if inside(layer, [name])]
        most = sum(inside(layer, within) for layer in own) * 2 > len(own)
        return parts(within) if within and most else [name]

    return parts(found)


def _holds_blocks(module: nn.Module) -> bool:
    """Whether there is a list of several modules with children in it."""
    lists = [m for m in module.modules() if isinstance(m, LISTS)]
    return any(sum(any(True for _ in c.children()) for c in m.children()) > 1 for m in lists)


def _size(targets: Iterable[Target]) -> int:
    return sum(prod(t.shape) for t in targets)


def _stem(model: nn.Module, convolutions: list[Target]) -> list[Target]:
    """A first convolution over raw input (images, spectrograms, sound), and its neighbours in a stem
    of several (ResNet-D's conv1.0, conv1.3): the widest part of the model around it that holds under
    5 % of the convolutions' weights."""
    if len(convolutions) < 2:
        return []
    first = cast(_ConvNd, submodule(model, convolutions[0].module))
    if first.in_channels > RAW_CHANNELS:
        return []
    parts = convolutions[0].module.split(".")
    stem = convolutions[:1]
    for depth in range(len(parts), 0, -1):
        wider = [t for t in convolutions if inside(t.module, [".".join(parts[:depth])])]
        if _size(wider) < 0.05 * _size(convolutions):
            stem = wider
    return stem
