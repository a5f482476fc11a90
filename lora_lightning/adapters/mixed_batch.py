"""Different adapters for different samples of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.adapters.inject import refuse_choosing
from lora_lightning.adapters.mixed_branch import MixedBranch, has_mixed_branch
from lora_lightning.adapters.mixed_samples import MixedSamples, refuse_boxes, taking_boxes
from lora_lightning.adapters.mixed_split import split_call
from lora_lightning.adapters.state import state_of, views_as
from lora_lightning.errors import UserError
from lora_lightning.layers.layer import LoRALayer
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.viewed import own_forward
from lora_lightning.layers.views import Standing, View, opened, seen
from lora_lightning.utils.names import joined


@contextmanager
def mixed_adapters(model: nn.Module, samples: Sequence[str | None]) -> Iterator[None]:
    """Within this context each sample of a batch has its own adapter; None is the base model.

    The outputs are those of running each sample by itself with its adapter selected. Linear layers,
    convolutions and embeddings take two batched products, whatever the number of adapters; layers whose
    weight is read as a whole (nn.MultiheadAttention, RNNs, classes with a forward of their own) and heads,
    norms and biases of the adapters' own are called once for each adapter of the batch.

    The samples are the first dimension of each layer's input, or that holds a multiple of them with each
    sample's together (windows, flattened tokens); copies of the batch one after the other (`torch.cat` of two
    views, frames before samples) look the same and are answered wrongly. In a model with sequence-first
    attention or RNNs, that one of the first two dimensions which is their number. Gradients reach the updates
    of selected adapters; of the heads they reach that of the first selected. Parts under gradient
    checkpointing are computed again by the adapters of their forward; with `use_reentrant=True` call
    `backward` within the context.

    It holds for the calling thread and asyncio task alone, also within another such context.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        samples: an adapter's name, or None, for each sample of the batch.

    Raises:
        UserError: an unknown name; the model is not adapted, or merged; layers of boxes are adapted, of which
            each picture has as many as were found (torchvision's RoI heads). In the context: a layer's input
            in which the samples cannot be told, or an adapted layer whose weight is read without a call.

    Example::

        with ll.mixed_adapters(model, ["scottish", "indian", None]):
            y = model(x)  # x: (3, ...)
    """
    state = state_of(model)
    refuse_choosing(model, "mixed_adapters")
    if isinstance(samples, str) or not samples:
        raise UserError(
            f"mixed_adapters: samples={samples!r}: give a list with one adapter's name, or None, a sample."
        )
    for name in samples:
        if name is not None:
            state.named(name)
    each = views_as(model, [() if n is None else (n,) for n in dict.fromkeys(samples)], "mixed_adapters")
    modules = each[0].modules
    mixed = MixedSamples(samples, sequence_first(modules), modules.values())
    with opened(each[0] if len(each) == 1 else _mixed(mixed, each)):
        yield


def _mixed(samples: MixedSamples, each: list[View]) -> View:
    """The view in which every sample has its own adapter.

    Args:
        each: the view of each adapter in `samples.distinct`.
    """
    modules = each[0].modules
    differing: dict[str, set[str]] = {}
    values: dict[str, Tensor | Standing | None] = {}
    for name in dict.fromkeys(n for view in each for n in view.values):
        path, _, leaf = name.rpartition(".")
        of_each = [_source(view, name, modules[path], leaf) for view in each]
        if any(value is not of_each[0] for value in of_each):
            differing.setdefault(path, set()).add(leaf)
            values[name] = None  # it cannot be read as one
        elif name in each[0].values:
            values[name] = each[0].values[name]
    called = dict.fromkeys([*differing, *(p for p, m in modules.items() if _differs(m, samples))])
    refuse_boxes(taking_boxes(modules, called))
    for path in [*called]:
        parent = path.rpartition(".")[0]
        if path and isinstance(modules.get(parent), nn.MultiheadAttention):
            called[parent] = None
    samples.called = {id(modules[path]): path for path in called}
    calls = {path: _call(path, modules[path], samples, each, differing.get(path, set())) for path in called}
    return View(each[0].choice, "mixed_adapters", (), values, samples, calls, modules)


def _differs(module: nn.Module, samples: MixedSamples) -> bool:
    """Whether the samples' adapters have updates in the module."""
    return isinstance(module, LoRALayer) and any(n in module.lora for n in samples.distinct if n is not None)


def _source(view: View, name: str, module: nn.Module, leaf: str) -> Tensor | None:
    """What a view reads of the module's own tensor of this name, to be compared by identity."""
    standing = (module._parameters if leaf in module._parameters else module._buffers)[leaf]
    value = view.values.get(name, standing)
    return value.parameter if isinstance(value, Standing) else value


def _call(
    path: str, module: nn.Module, samples: MixedSamples, each: list[View], own: set[str]
) -> Callable[..., Any]:
    """The forward of a module of which the adapters of the samples have their own updates or values.

    Args:
        own: leaf names of the values.
    """
    if isinstance(module, LoRALayer) and has_mixed_branch(module) and own <= {"bias"}:
        mine = {n: v for n, v in each[0].values.items() if n.rpartition(".")[0] == path}
        same = {n: v for n, v in mine.items() if n.rpartition(".")[2] not in own}
        slots: dict[Slot, list[LowRankUpdate | None]] = {}
        for j, name in enumerate(samples.distinct):
            for update in module.updates(name) if name is not None and name in module.lora else []:
                slots.setdefault(update.slot, [None] * len(samples.distinct))[j] = update
        return MixedBranch(
            module, path, samples, slots, same, partial(_biases, path, module, samples, each) if own else None
        )

    def split(*args: Any, **kwargs: Any) -> Any:
        return split_call(samples, module, own_forward(module), lambda j: seen(each[j]), args, kwargs)

    return split


def _biases(path: str, module: nn.Module, samples: MixedSamples, each: list[View]) -> Tensor:
    """The module's bias of each sample."""
    name = joined(path, "bias")
    values = [v.value(name) if name in v.values else module._parameters["bias"] for v in each]
    return samples.by_sample(cast("list[Tensor]", values))


def sequence_first(modules: Mapping[str, nn.Module]) -> str:
    """Name of the first module that takes (time, batch, features), or ""."""
    for name, module in modules.items():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first:
            return name or type(module).__name__
    return ""
