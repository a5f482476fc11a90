"""Slots of projections that hold several in one matrix: nn.MultiheadAttention, timm's fused qkv."""

from __future__ import annotations

from torch import nn

from lora_lightning.layers.slot import Slot

FUSED = ("qkv", "in_proj", "to_qkv", "query_key_value")


def attention_slots(module: nn.MultiheadAttention) -> dict[str, Slot]:
    """`in_proj` with the parts `in_proj.q`, `.k` and `.v`, or the three separate projections. The
    output projection is a linear layer of its own, which attention reads by its weight."""
    if module.in_proj_weight is not None:
        return {
            "in_proj": Slot("in_proj_weight"),
            **fused_parts("in_proj", "in_proj_weight", module.embed_dim),
        }
    return {f"{p}_proj": Slot(f"{p}_proj_weight") for p in "qkv"}


def fused_parts(name: str, parameter: str, size: int) -> dict[str, Slot]:
    """Query, key and value as rows of one matrix of 3·size rows, each with an update of its own."""
    prefix = f"{name}." if name else ""
    return {
        f"{prefix}{p}": Slot(parameter, (i * size, (i + 1) * size), part=True) for i, p in enumerate("qkv")
    }
