"""Gradient checkpointing: activations within a network's blocks are made again in the backward, not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lightning.errors import ConfigError
from lora_lightning.planning.structure import blocks_in_order
from lora_lightning.trainer.averaging import moving_norms
from lora_lightning.utils.names import submodule

Undo = Callable[[], object]


def recompute_blocks(network: nn.Module) -> list[Undo]:
    """From now on keep of each block its input alone: by timm's and transformers' own switch, elsewhere by
    torch's checkpoint around each block, without reentrance, so that inputs may be frozen.

    Where running statistics move, it is always the last: the second forward must not move them again.

    Returns:
        What takes it back.

    Raises:
        ConfigError: no blocks are found.
    """
    network_class: Any = type(network)
    anything: Any = network
    if not moving_norms(network):
        if hasattr(network_class, "set_grad_checkpointing"):
            with contextlib.suppress(AssertionError):  # timm's models that have no such way
                anything.set_grad_checkpointing(True)
                return [partial(anything.set_grad_checkpointing, False)]
        if getattr(network, "supports_gradient_checkpointing", False):
            anything.gradient_checkpointing_enable({"use_reentrant": False})
            return [anything.gradient_checkpointing_disable]
    blocks = [submodule(network, name) for name in blocks_in_order(network)]
    if not blocks:
        name = network_class.__name__
        raise ConfigError([f"gradient_checkpointing=True: no blocks are found in {name}. Give false."])
    for block in blocks:
        block.__dict__["forward"] = partial(_recomputed, block, block.forward)
    return [partial(block.__dict__.pop, "forward", None) for block in blocks]


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    norms = moving_norms(block)
    more: dict[str, Any] = {**options, "context_fn": partial(_contexts, norms)} if norms else options
    return checkpoint(forward, *args, use_reentrant=False, **more)


def _contexts(norms: list[nn.Module]) -> tuple[Any, Any]:
    """For the first forward, and for the second."""
    return contextlib.nullcontext(), _standing(norms)


@contextlib.contextmanager
def _standing(norms: list[Any]) -> Iterator[None]:
    """Meanwhile the batches' statistics are used, and the running ones stay."""
    before = [(norm, norm.momentum, norm._buffers["num_batches_tracked"]) for norm in norms]
    for norm in norms:
        norm.momentum, norm._buffers["num_batches_tracked"] = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm._buffers["num_batches_tracked"] = momentum, count
