"""How plain weights go into a model of the library that has it, in lines of Python for a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_lightning.files.allowed import RESERVED

OWN = (*RESERVED, "name", "pretrained", "pretrained_backbone", "checkpoint", "weights", "num_classes")
LOAD = 'model.load_state_dict(load_file("model.safetensors"))'
Node = Mapping[str, Any]


def loading_lines(node: Node, facts: Mapping[str, Any]) -> str:
    """The lines; empty where the model is of no library's own build.

    Args:
        node: the section `model` of a configuration.
        facts: what its data say.
    """
    target = str(node.get("_target_", "")).rpartition(".")[2]
    make = LIBRARIES.get(target)
    name = node.get("name")
    if make is None or not isinstance(name, str):
        return ""
    count = facts.get("num_classes", node.get("num_classes"))
    options = {k: v for k, v in node.items() if k not in OWN and v is not None}
    made = make(name, count, options)
    return f"{made}\n{LOAD}" if made else ""


def plain_network(model: nn.Module) -> nn.Module:
    """The library's own model in one of ours that wraps it."""
    inner = {"RTDetr": "model", "Whisper": "network"}.get(type(model).__name__)
    return model.get_submodule(inner) if inner else model


def _timm(name: str, count: Any, options: Node) -> str:
    return f"import timm\n\nmodel = timm.create_model({_call(name, num_classes=count, **options)})"


def _torchvision(name: str, count: Any, options: Node) -> str:
    name = name.removeprefix("torchvision/")
    called = _call(name, weights=None, num_classes=count, **options)
    return f"import torchvision\n\nmodel = torchvision.models.get_model({called})"


def _detector(name: str, count: Any, options: Node) -> str:
    if name.endswith("_small"):
        return ""
    classes = count + 1 if isinstance(count, int) else None  # and the background
    called = _call(name, weights=None, weights_backbone=None, num_classes=classes, **options)
    return f"import torchvision\n\nmodel = torchvision.models.get_model({called})"


LIBRARIES: dict[str, Callable[[str, Any, Node], str]] = {  # by the builder
    "timm_model": _timm,
    "torchvision_model": _torchvision,
    "detector": _detector,
}


def _call(*values: Any, **options: Any) -> str:
    return ", ".join([*map(repr, values), *(f"{name}={value!r}" for name, value in options.items())])
