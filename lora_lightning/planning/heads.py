"""The output layers of a model, found by its structure and by the usual attribute names."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lora_lightning.layers.registry import slots_of
from lora_lightning.planning.structure import embedding_weights, in_block
from lora_lightning.utils.names import inside, joined, named_children, named_modules, submodule, unwrapped

# Attribute names under which timm, torchvision, torchaudio and transformers keep their output layers.
HEAD_NAMES = (
    "head", "heads", "head_dist", "fc", "classifier", "classification_head", "lm_head", "proj_out", "score",
    "output_layer", "qa_outputs", "aux", "aux1", "aux2", "AuxLogits", "aux_classifier",
    "box_predictor", "mask_predictor", "keypoint_predictor", "class_labels_classifier", "bbox_predictor",
    "class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head",
)  # fmt: skip


def find_heads(model: nn.Module) -> list[str]:
    """Names of the output layers: what timm's `get_classifier` gives; outside of that the usual attribute
    names; else the last layer of all when it looks like an output. Empty when there is none.

    Of a head of several layers (VGG's classifier, a detector's towers) only the outputs are meant. An
    output tied to an embedding (`proj_out` of Whisper) is part of the pretrained model and no head; a table
    of classes (RT-DETR's `denoising_class_embed`) is one where the model declares it.
    """
    declared, declaring = _declared_heads(model)
    last = _last_layer(model)
    named = [] if "" in declaring else [n for n in _named_heads(model) if not inside(n, declaring)]
    if not declared and "" not in declaring and last and not inside(last, [*named, *declaring]):
        named = [last]  # DeepSpeech: fc1.fc … fc4.fc, then out
    outputs = [layer for head in named for layer in _output_layers(model, head)]
    embedded = embedding_weights(model)
    return [
        name
        for name in dict.fromkeys([*declared, *outputs])
        if not any(id(p) in embedded for p in submodule(model, name).parameters())
        or (name in declared and isinstance(submodule(model, name), nn.Embedding))
    ]


def _declared_heads(model: nn.Module) -> tuple[list[str], list[str]]:
    """The classifiers that modules declare, and the names of the modules that declare."""
    heads: list[str] = []
    declaring: list[str] = []
    for name, module in named_modules(model).items():
        get_classifier = getattr(module, "get_classifier", None)
        if not callable(get_classifier) or "" in declaring or inside(name, declaring):
            continue
        declared = get_classifier()
        declared = [
            unwrapped(h) if isinstance(h, nn.Module) else h
            for h in (declared if isinstance(declared, (tuple, list)) else [declared])
        ]
        found = [n for n, m in named_modules(module).items() if any(m is h for h in declared) and holds(m)]
        heads += [joined(name, n) for n in found]
        declaring.append(name)
    return heads, declaring


def _named_heads(model: nn.Module) -> list[str]:
    heads: list[str] = []
    for name, module in named_modules(model).items():
        last = name.rpartition(".")[2]
        if last in HEAD_NAMES and holds(module) and not in_block(model, name) and not inside(name, heads):
            heads.append(name)
    return heads


def _output_layers(model: nn.Module, head: str) -> list[str]:
    """The last layer of a stack; of a module with layers of its own beside stacks those layers
    (RetinaNet's cls_logits beside its tower); of several heads in one, each one's."""
    module = submodule(model, head)
    parts = {
        n: m for n, m in named_children(module).items() if _is_layer(m) or any(map(_is_layer, m.modules()))
    }
    if _is_layer(module) or not parts:
        return [head]
    if isinstance(module, nn.Sequential):
        return _output_layers(model, f"{head}.{list(parts)[-1]}")
    if any(_is_layer(m) for m in parts.values()):
        own = {n: m for n, m in parts.items() if _is_layer(m)}
        parts = {n: m for n, m in own.items() if not any(_feeds(m, other) for other in own.values())}
    outputs = [layer for n in parts for layer in _output_layers(model, f"{head}.{n}")]
    layers = [n for n, m in named_modules(module).items() if _is_layer(m)]
    return [head] if len(outputs) == len(layers) else outputs


def _feeds(one: nn.Module, other: nn.Module) -> bool:
    """Whether two linear layers stand one after the other rather than side by side (GoogLeNet's aux)."""
    if not isinstance(one, nn.Linear) or not isinstance(other, nn.Linear):
        return False
    return one.out_features == other.in_features != one.in_features


def _is_layer(module: nn.Module) -> bool:
    return bool(slots_of("", module))


def _last_layer(model: nn.Module) -> str | None:
    """The last layer of all, outside the blocks: a linear one, or a convolution that gives fewer
    channels than every other (Wav2Letter's, a U-Net's)."""
    layers = {
        n: m for n, m in named_modules(model).items() if _is_layer(m) and not isinstance(m, nn.Embedding)
    }
    if len(layers) < 2:
        return None
    name = list(layers)[-1]
    last, others = layers.pop(name), layers.values()
    if in_block(model, name):
        return None
    if isinstance(last, _ConvNd):
        channels = [m.out_channels for m in others if isinstance(m, _ConvNd)]
        return name if channels and last.out_channels < min(channels) else None
    return name if isinstance(last, nn.Linear) and not _within(model, name, nn.MultiheadAttention) else None


def _within(model: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    return isinstance(submodule(model, name.rpartition(".")[0]), kind)


def holds(module: nn.Module) -> bool:
    """Whether the module has parameters."""
    return next(module.parameters(), None) is not None
