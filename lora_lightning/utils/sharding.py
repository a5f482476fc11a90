"""Sharded parameters: what is left of them in one process, and how they are gathered."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_lightning.errors import UserError


def is_shard(weight: Tensor) -> bool:
    """Whether this is a part of a weight, as FSDP and FSDP2 leave it outside the forward, or a view whose
    memory FSDP has given back. It is then FSDP that reads it, to see whether it still is the parameter
    that it put there."""
    return _is_part(weight) or weight.untyped_storage().size() == 0


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP (`FullyShardedDataParallel`) has made a flat parameter of the model's parameters."""
    return any(getattr(p, "_fsdp_flattened", False) for p in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only parts of the model's parameters, by FSDP, FSDP2 or tensor
    parallelism. The updates, of which there may be thousands, go as the weights beside them."""
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        if any(_is_part(p) for p in module._parameters.values() if p is not None):
            return True
        updates = module._modules.get("lora") if getattr(module, "keeps_state", False) else None
        children = {c for c in module._modules.values() if c is not None and c is not updates} - seen
        seen |= children
        waiting += children
    return False


def _is_part(weight: Tensor) -> bool:
    return hasattr(weight, "full_tensor") or getattr(weight, "_fsdp_flattened", False)


WHOLE = "Save the adapter and load it into a whole model: docs/distributed.md shows how."
FIRST = "Do that first and shard the model then."


def refuse_sharded(model: nn.Module, action: str, remedy: str = WHOLE) -> None:
    """Refuse what only whole parameters allow.

    Raises:
        UserError: the model is sharded; nothing was done.
    """
    if is_sharded(model):
        raise UserError(
            f"{action}: the model is sharded, and this process holds parts of its parameters. {remedy}"
        )


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, by its name. Every process must call this, with the same names."""
    return {n: whole(t) for n, t in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes where FSDP2 has sharded it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
