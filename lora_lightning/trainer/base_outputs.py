"""What the updates change of the outputs of a training step's networks: each call is made again without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_lightning.adapters.state import state_of
from lora_lightning.errors import UserError
from lora_lightning.layers.registry import LoRALayer
from lora_lightning.layers.views import View, opened
from lora_lightning.methods.regularizers import of_outputs

CALL = "_compiled_call_impl"  # what torch's Module calls in place of its own `_call_impl`, where it is set
REMEDY = "leave outputs out of regularizer, or call the network as a whole, self(x) or self.model(x)."


class BaseOutputs:
    """Listens to the calls of a LightningModule's networks: its children with adapted layers, or itself where
    it is called. Each call is repeated in eval mode, without gradients and without the updates; heads, norms
    and biases are as they are now, so that a head that began anew is no distance.

    Args:
        model: the module that was given to `inject`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        children = [c for c in model.children() if any(isinstance(m, LoRALayer) for m in c.modules())]
        self._networks: list[nn.Module] = [model, *children]
        self._distances: list[Tensor] = []
        self._within = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context the networks' calls are taken up."""
        self._distances = []
        before = {network: network.__dict__.get(CALL) for network in self._networks}
        for network, compiled in before.items():
            network.__dict__[CALL] = partial(self._called, network, compiled or network._call_impl)
        try:
            yield
        finally:
            for network, compiled in before.items():
                network.__dict__[CALL] = compiled

    def distance(self) -> Tensor:
        """The mean over the calls that were taken up, a number with its gradient.

        Raises:
            UserError: there was none with an output that training can change.
        """
        if not self._distances:
            raise UserError(
                f"regularizer.outputs: the training step of {type(self.model).__name__} calls no network "
                f"that gives more than losses: {REMEDY}"
            )
        return sum(self._distances) / len(self._distances)  # type: ignore[return-value]  # not empty

    def _called(self, network: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._within:  # a part of one that is called
            return call(*args, **kwargs)
        self._within = True
        try:
            outputs = call(*args, **kwargs)
            changed = _changeable(outputs)
            if any(t is not None for t in changed):
                self._take_up(network, changed, self._of_base(network, call, args, kwargs), (args, kwargs))
        finally:
            self._within = False
        return outputs

    def _take_up(self, network: nn.Module, changed: list[Tensor | None], base: list[Any], given: Any) -> None:
        name = type(network).__name__
        if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tree_leaves(given)):
            raise UserError(
                f"regularizer.outputs: {name} is called with what another trained network has computed, and "
                f"the base's outputs would not be those of the base: {REMEDY}"
            )
        pairs = [(y, y0) for y, y0 in zip(changed, base, strict=False) if y is not None]
        if len(changed) != len(base) or any(_shape(y) != _shape(y0) for y, y0 in pairs):
            raise UserError(
                f"regularizer.outputs: {name} has other outputs in eval mode than while it trains (detectors "
                "have, and networks with auxiliary heads): leave outputs out of regularizer."
            )
        self._distances.append(of_outputs([y for y, _ in pairs], [y0 for _, y0 in pairs]))

    @torch.no_grad()
    def _of_base(self, network: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        without = View(state_of(self.model).choice, "adapters_off")
        with opened(without), _evaluated(network):
            return tree_leaves(call(*args, **kwargs))


def _changeable(outputs: Any) -> list[Tensor | None]:
    """The tensors of which training can change the values, but for losses; None for other parts."""
    return [
        t if isinstance(t, Tensor) and t.requires_grad and t.dim() > 0 else None for t in tree_leaves(outputs)
    ]


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Within this context the network is in eval mode: nothing is dropped, no statistics move."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
