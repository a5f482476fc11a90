"""The parts of a detector (backbone, neck, heads), found by the names that its library gives them."""

from __future__ import annotations

from torch import nn

from lora_lightning.utils.names import inside, named_children, named_modules, submodule

# Beside the trunk in a torchvision backbone: feature pyramids, and SSD's extra layers.
NECKS = ("fpn", "neck", "extra")


def detectors(model: nn.Module) -> list[str]:
    """Names of the detectors in a model, "" being the model itself: torchvision's (a backbone beside an
    RPN and RoI heads, or beside a head and an anchor generator) and the DETR family (a backbone beside an
    encoder and a decoder)."""
    return [
        name for name, module in named_modules(model).items() if _is_torchvision(module) or _is_detr(module)
    ]


def is_convolutional(model: nn.Module) -> bool:
    """Whether the model is, or holds, a detector after the manner of torchvision's."""
    return any(map(_is_torchvision, model.modules()))


def within_part(model: nn.Module, part: str, names: list[str]) -> list[str]:
    """Those of the layers' names that lie in a part of the model's detectors.

    Args:
        part: "backbone", the trunk alone; "neck", the backbone and what gathers its features (a feature
            pyramid, the encoder of a DETR); "all", everything.
    """
    if part == "all":
        return names
    trunks, necks = [], []
    for name in detectors(model):
        detector = submodule(model, name)
        prefix = f"{name}." if name else ""
        trunks.append(f"{prefix}backbone")
        if _is_torchvision(detector):
            children = list(named_children(submodule(detector, "backbone")))
            necks += [f"{prefix}backbone.{n}" for n in children if n in NECKS]
        else:
            children = list(named_children(detector))
            necks += [f"{prefix}{n}" for n in children if "encoder" in n or n.startswith("input_proj")]
    if part == "backbone":
        return [n for n in names if inside(n, trunks) and not inside(n, necks)]
    return [n for n in names if inside(n, [*trunks, *necks])]


def _has(module: nn.Module, *children: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in children)


def _is_torchvision(module: nn.Module) -> bool:
    two_stages = _has(module, "backbone", "rpn", "roi_heads")
    return two_stages or _has(module, "backbone", "head", "anchor_generator")


def _is_detr(module: nn.Module) -> bool:
    return _has(module, "backbone", "encoder", "decoder")
