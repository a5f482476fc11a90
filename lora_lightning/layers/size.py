"""The sizes of an adapted layer's weight, which do not change: its updates would not fit."""

from __future__ import annotations

from typing import cast

from lora_lightning.errors import UserError
from lora_lightning.layers.swap import ClassSwap


class FixedSize(property):
    """An attribute with one side of the weight, which does not change: transformers sets it when it resizes a
    layer, having written to `layer.weight.data`, which is made anew at each reading.

    Setting another size raises UserError; the layer is unchanged.
    """

    def __init__(self, name: str) -> None:
        def get(layer: ClassSwap) -> int:
            return cast(int, layer.__dict__[name])

        def put(layer: ClassSwap, size: int) -> None:
            if size != layer.__dict__.get(name, size):
                raise UserError(resized(layer, name, layer.__dict__[name], size))
            layer.__dict__[name] = size

        super().__init__(get, put)


def resized(layer: ClassSwap, name: str, before: object, after: object) -> str:
    where = layer.__dict__["lora_path"] or "the model"
    return (
        f"{where}: {name} of an adapted {layer.original_class.__name__} is "
        f"{before}, and its updates do not fit {after}. Resize the model (resize_token_embeddings) before it "
        "is adapted, or call lora_lightning.eject(model), resize, and inject again."
    )
