"""A few batches through a plain model: the second moments of its layers' inputs, and how often each weight is
used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from lora_lightning.adapters.measure import run, seen_inputs
from lora_lightning.adapters.unharmed import unharmed
from lora_lightning.compression.form import Layer, kind_of
from lora_lightning.compression.held import Held
from lora_lightning.compression.moment import LEADING, WHOLE, Moment
from lora_lightning.compression.positions import Positions
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.planning.plan import LayerPlan
from lora_lightning.utils.names import named_modules
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import truncate_list


@dataclass
class Looked:
    """What the data showed.

    Attributes:
        moments: of the layers' inputs, by name; of those that were reached.
        positions: of every linear layer and convolution that was called, by name.
        dense: FLOPs of these.
        count: of batches.
    """

    moments: dict[str, Moment]
    positions: dict[str, Positions]
    dense: dict[str, int]
    count: int


def batches_of(data: Iterable[Any]) -> list[Any]:
    """The batches of data as a list.

    Raises:
        ConfigError: they are a single batch, whose rows or names would be taken for batches, or none.
    """
    if isinstance(data, (Tensor, Mapping, str, bytes)) or not isinstance(data, Iterable):
        raise ConfigError([
            f"data: is one {type(data).__name__}: give a list of batches, each a tensor, a tuple of "
            "arguments or a dictionary of keyword arguments."
        ])  # fmt: skip
    return list(data)


def look(model: nn.Module, layers: Mapping[str, Layer], data: Iterable[Any]) -> Looked:
    """Run a model over batches; it is, bit for bit, as it was.

    Args:
        data: each batch a tensor, a tuple of arguments or a dictionary of keyword arguments.

    Raises:
        UserError: there is no batch, the model does not take one, or some input is not finite.
    """
    positions: dict[str, Positions] = {}
    tables = {n: layer for n, layer in layers.items() if isinstance(layer, nn.Embedding)}
    columns = {n: layer.weight[0].numel() for n, layer in layers.items() if n not in tables}
    ranks = {n: size if size <= WHOLE else LEADING for n, size in columns.items()}
    plans = [_planned(n, layers[n]) for n in columns]
    counts = {n: torch.zeros(len(table.weight), dtype=torch.long) for n, table in tables.items()}
    multiplied = {n: m for n, m in named_modules(model).items() if isinstance(m, (nn.Linear, _ConvNd))}
    weighted: dict[str, Any] = {**multiplied, **tables}
    with unharmed(model):
        hooks = [m.register_forward_hook(partial(_count, positions, n)) for n, m in weighted.items()]
        hooks += [m.register_forward_pre_hook(partial(_look_up, counts[n])) for n, m in tables.items()]
        try:
            batches = working(data, "measuring the layers' inputs", "batches")
            seen, count = seen_inputs(model, plans, batches, partial(_run, model), ranks)
        except UserError as error:
            raise UserError(f"data: {error}.") from None
        finally:
            for hook in hooks:
                hook.remove()
    reached = {one.layer.name: one.moments for one in seen if one.moments.rows}
    wrong = [n for n, m in reached.items() if m.total is None or not torch.isfinite(m.total).all()]
    if wrong:
        raise UserError(f"data: inputs of {truncate_list(wrong)} hold NaN or infinity: give others.")
    dense = {}
    for name, where in positions.items():
        place = "inputs" if isinstance(weighted[name], _ConvTransposeNd) else "outputs"
        dense[name] = where.flops(weighted[name].weight.numel(), "looked up" if name in tables else place)
    moments = {n: Moment(m) for n, m in reached.items()}
    moments |= {n: Moment.of_counts(seen) for n, seen in counts.items()}
    return Looked(moments, positions, dense, count)


def _run(model: nn.Module, batch: Any) -> None:
    try:
        run(model, batch)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:240].rstrip(".") or type(error).__name__
        sizes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(batch) if isinstance(t, Tensor))
        raise UserError(
            f"the model does not take a batch of {sizes or type(batch).__name__}: {reason}; "
            "give what its forward takes"
        ) from error


def _planned(name: str, layer: Layer) -> LayerPlan:
    """A layer as what sees its inputs takes it."""
    module, slot = (layer.name, layer.slot) if isinstance(layer, Held) else (name, "")
    shape = tuple(layer.weight.shape)
    return LayerPlan(name, module, slot, kind_of(layer), shape, 1, 1.0, layer.weight.numel())


def _look_up(counts: Tensor, module: nn.Embedding, args: tuple[Any, ...]) -> None:
    if args:
        counts += torch.bincount(args[0].flatten().cpu(), minlength=len(counts))


def _count(
    positions: dict[str, Positions], name: str, module: Any, args: tuple[Any, ...], output: Tensor
) -> None:
    """Note how often a module's weight was used in a call."""
    if not args:  # given by its name: as many as come out, but for a stride
        args = (output,)
    found = positions.setdefault(name, Positions())
    x = args[0]
    if isinstance(module, nn.Linear):
        x_places = places = between = output.numel() // module.out_features
    elif isinstance(module, nn.Embedding):
        x_places = places = between = output.numel() // module.embedding_dim
    else:
        x_places = x.numel() // module.in_channels
        places = output.numel() // module.out_channels
        between = places // output.shape[-1] * x.shape[-1]
    found.inputs += x_places
    found.between += between
    found.outputs += places
