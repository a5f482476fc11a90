"""What a base is called: in words, on the Hugging Face hub, and under which licence its weights are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.utils.libraries import loading

HUB_ID = re.compile(r"(?:hf[-_]hub:)?([\w-][\w.-]*/[\w-][\w.-]*)", re.ASCII)
TIMM = ("lora_lightning.models.timm.timm_model", "lora_lightning.models.timm_segmentation.timm_segmenter")


@dataclass(frozen=True)
class Base:
    """A base by its names.

    Attributes:
        hub: its repository on the Hugging Face hub; empty where it has none that is known.
        licence: of its weights, as timm states it; empty where that is not known.
    """

    name: str
    hub: str = ""
    licence: str = ""


def base_of_origin(config: Mapping[str, Any], base_class: str) -> Base:
    """The base that an adapter's own configuration builds.

    Args:
        config: the sections of `Origin.config`.
        base_class: what it is called where no configuration says.
    """
    node = config.get("model")
    node = node if isinstance(node, Mapping) else {}
    checkpoint, name = node.get("checkpoint"), node.get("name")
    if isinstance(checkpoint, str):
        return Base(f"{name} ({checkpoint})" if isinstance(name, str) else checkpoint)
    if not isinstance(name, str):
        return Base(base_class or "a network")
    if node.get("pretrained") is False:
        return Base(f"{name} with random weights")
    if found := HUB_ID.fullmatch(name):
        return Base(name, found[1])
    return _of_timm(name) if node.get("_target_") in TIMM else Base(name)


def _of_timm(name: str) -> Base:
    with loading("timm"):
        from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    if known is None:
        return Base(name)
    return Base(name, known.hf_hub_id or "", known.license or "")
