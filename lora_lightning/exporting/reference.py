"""What a file has to give: the outputs of the adapted model, of which nothing is merged."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.manage import adapters_off, set_adapter, unmerge
from lora_lightning.exporting.subject import copied, named_outputs, normalization, refused

SELECTED = ""  # of adapters: those that are


class Reference:
    """An adapted model in eval mode, a copy.

    Args:
        shown: how pictures of bytes are normalized; None where no bytes go in.
        choice: the adapter; None is none of them, SELECTED those that are selected.
    """

    def __init__(self, model: nn.Module, shown: Mapping[str, Any] | None, choice: str | None) -> None:
        self.model, self.choice, self.shown = copied(model).eval().cpu(), choice, normalization(shown)
        if choice:
            unmerge(self.model)
            set_adapter(self.model, choice)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of inputs by name.

        Raises:
            UserError: the model does not take them.
        """
        given = dict(inputs)
        if self.shown is not None:
            mean, std = self.shown
            given = {name: (value.float() / 255 - mean) / std for name, value in inputs.items()}
        base = adapters_off(self.model) if self.choice is None else contextlib.nullcontext()
        remedy = "Leave out of dynamic what is of one size, or give check=."
        with base, refused(self.model, given, remedy):
            return [tensor for _, tensor in named_outputs(self.model(**given))]


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures of bytes of the size of an example's."""
    if pictures.dtype == torch.uint8:
        return pictures
    source = torch.Generator().manual_seed(0)
    return torch.randint(256, pictures.shape, generator=source, dtype=torch.uint8)
