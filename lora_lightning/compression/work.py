"""Work: a model that is being compressed, with what is known of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lora_lightning.compression.allocate import Choice
from lora_lightning.compression.form import Layer, Rank
from lora_lightning.compression.forms import FORMS
from lora_lightning.compression.held import Held
from lora_lightning.compression.inputs import Looked
from lora_lightning.compression.layers import READ
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.positions import Positions
from lora_lightning.compression.recurrent import Stack
from lora_lightning.compression.recurrent_readers import lstms_of
from lora_lightning.errors import UserError
from lora_lightning.planning.plan import summary


@dataclass
class Work:
    """A model that is being compressed.

    Attributes:
        left: layers that stay as they are, and why.
        seen: what the data showed; None without data.
        plain: whether the weights alone count, although there are data.
        counts: what a budget counts: "parameters", "flops" or "latency", in nanoseconds.
        stacks: LSTMs with their readers, which are in `layers` no more.
        times: nanoseconds of the layers as they are, where they were measured.
    """

    layers: dict[str, Layer]
    left: dict[str, str]
    seen: Looked | None
    plain: bool
    counts: str = "parameters"
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def moment(self, name: str) -> Moment:
        """Of a layer's inputs."""
        return Moment() if self.seen is None or self.plain else self.seen.moments[name]

    def choice(self, name: str, form: str, rank: Rank, lost: float) -> Choice:
        """With its costs."""
        if name in self.stacks:
            return self._stacked(name, form, rank, lost)
        parts = FORMS[form].parts(self.layers[name], rank)
        parameters, flops = sum(part.size for part in parts), None
        if self.seen is not None:
            where = self.seen.positions.get(name, Positions())
            flops = FORMS[form].flops(self.layers[name], rank, where, self.seen.count)
        cost = flops if self.counts == "flops" and flops is not None else parameters
        return Choice(form, rank, parameters, flops, lost, cost)

    def dense(self, name: str) -> Choice:
        """The layer as it is."""
        if name in self.stacks:
            return self._clocked(name, self._stacked(name, "dense", (), 0.0))
        size = self.layers[name].weight.numel()
        flops = None if self.seen is None else self.seen.dense.get(name, 0)
        cost = flops if self.counts == "flops" and flops else size
        return self._clocked(name, Choice("dense", (), size, flops, 0.0, cost))

    def _clocked(self, name: str, dense: Choice) -> Choice:
        return replace(dense, cost=self.times.get(name, 0)) if self.counts == "latency" else dense

    def _stacked(self, name: str, form: str, rank: Rank, lost: float) -> Choice:
        """Of an LSTM with its readers."""
        width = rank[0] if rank else None
        stack, flops = self.stacks[name], None
        parameters = stack.parameters(width)
        if self.seen is not None:
            flops = stack.flops(width, {n: self.seen.positions[n].outputs for n in stack.readers})
        cost = flops if self.counts == "flops" and flops is not None else parameters
        return Choice(form, rank, parameters, flops, lost, cost)


def refuse_none(model: nn.Module, layers: Mapping[str, Layer], left: Mapping[str, str]) -> None:
    """Refuse a model of which no layer is left to compress; an LSTM is by the linear layers that read it.

    Raises:
        UserError: it is one.
    """
    if not layers:
        unread, recurrent = lstms_of(model, set())
        left = {**left, **recurrent, **dict.fromkeys(unread, "no linear layer reads it")}
        why = f": {summary(left)}" if left else ": it has no linear layer and no convolution"
        raise UserError(f"compress: no layer can be compressed{why}. Use the model as it is.")


def leave_unseen(model: nn.Module, work: Work) -> None:
    """Leave what the data did not reach, and what is read without being called.

    Raises:
        UserError: no layer is left to compress.
    """
    if work.seen is None:
        return
    for name, layer in list(work.layers.items()):
        if isinstance(layer, Held):
            reason = None if name in work.seen.moments else "no batch reaches it"
        elif name in work.seen.positions and name in work.seen.moments:  # a call with no rows shows nothing
            reason = None
        else:
            reason = READ if name in work.seen.moments else "no batch reaches it"
        if reason and name in work.seen.moments and isinstance(layer, nn.Linear):
            work.layers[name], reason = Held(layer, name, "", "weight"), None
        if reason:
            work.left[name] = reason
            del work.layers[name]
    refuse_none(model, work.layers, work.left)


def count_stacks(work: Work) -> None:
    """Count the FLOPs of LSTMs beside those of other layers."""
    for name, stack in work.stacks.items():
        if work.seen is not None:
            work.seen.dense[name] = stack.flops(None, dict.fromkeys(stack.readers, 0))
