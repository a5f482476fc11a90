"""compress: the layers of a model by smaller plain ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base_values import refuse_meta
from lora_lightning.compression.allocate import Choice, by_budget, by_energy, least
from lora_lightning.compression.by_hand import by_hand
from lora_lightning.compression.form import Layer, kind_of
from lora_lightning.compression.forms import FORMS
from lora_lightning.compression.gather import gather
from lora_lightning.compression.inputs import batches_of, look
from lora_lightning.compression.layers import empty, layers_of, put, refuse_adapted
from lora_lightning.compression.moment import Moment
from lora_lightning.compression.recurrent_stacks import in_place, stacks_of
from lora_lightning.compression.result import Compressed, CompressedLayer
from lora_lightning.compression.work import Work, count_stacks, leave_unseen, refuse_none
from lora_lightning.errors import ConfigError
from lora_lightning.methods.shortening import SHARE, one_limit
from lora_lightning.planning.plan import summary
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import Bounds, above
from lora_lightning.utils.names import named_parameters
from lora_lightning.utils.plurals import counted
from lora_lightning.utils.progress import working
from lora_lightning.utils.sharding import refuse_sharded

BUDGET: Bounds = above(0, below=1, note="0.5 is half of the original's")
Names = str | list[str] | tuple[str, ...]


@torch.no_grad()
def compress(
    model: nn.Module,
    *,
    energy: Annotated[float | None, SHARE] = None,
    parameters: Annotated[float | None, BUDGET] = None,
    flops: Annotated[float | None, BUDGET] = None,
    latency: Annotated[float | None, BUDGET] = None,
    ranks: Mapping[str, int | str] | None = None,
    data: Iterable[Any] | None = None,
    plain: bool = False,
    exclude: Names = (),
) -> Compressed:
    """Put smaller layers of torch in the places of linear layers and convolutions, in place.

    A linear layer and a 1×1 convolution become two (`svd`); a larger convolution `channel`, `spatial` or
    `tucker`, whichever loses least for its cost. Biases, strides, paddings, dtypes, devices, `requires_grad`
    flags and modes stay. The new parameters are other ones: make an optimizer afterwards.

    An LSTM gets a projection where linear layers alone read it, which become narrower (`projected`); its
    hidden state is narrower too.

    Args:
        model: without an adapter.
        energy: the share of Σσ² of its output that each layer keeps, with the fewest parameters that do.
        parameters: at most this share of the model's parameters, shared out for the least loss in all.
        flops: the same of the FLOPs of all linear layers and convolutions; needs data.
        latency: the same of the time that the layers which can be compressed take on this machine, with the
            threads that torch has, at the sizes of the first batch; needs data. What is slower than the
            layer is not taken.
        ranks: by hand: a layer's name or a pattern -> a rank, or a form with its rank: `"spatial:32"`,
            `"tucker:32x16"`, outputs first. Other layers stay as they are.
        data: a few batches, on the model's device: each a tensor, a tuple of arguments or a dictionary of
            keyword arguments. What is kept is then what matters for these inputs.
        plain: what is kept is what is largest in the weights, whatever the inputs.
        exclude: names or patterns of layers that stay as they are.

    Returns:
        What became of each layer; `print` it for a table.

    Raises:
        ConfigError: none or several of energy, parameters, flops, latency and ranks, or a bad one; neither
            data nor `plain`; data that are no list of batches; a budget that no choice of ranks meets. The
            model is untouched.
        UserError: the model has an adapter, is sharded or without values; no layer can be compressed; there
            is no batch, the model does not take one, or inputs are not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> compress(net, ranks={"0": 16}, plain=True).parameters
        (4810, 2762)
    """
    limits = {"parameters": parameters, "flops": flops, "latency": latency}
    problems = [one_limit(energy=energy, **limits, ranks=ranks)]
    if data is None:
        if not plain:
            problems.append("data=None: give a few batches, or plain=True for the weights alone.")
        if flops is not None:
            problems.append(f"flops={flops}: give data=, a few batches: FLOPs depend on their sizes.")
        if latency is not None:
            problems.append(f"latency={latency}: give data=, a few batches: time depends on their sizes.")
    require(compress, locals(), problems)
    refuse_sharded(model, "compress")
    refuse_adapted(model)
    refuse_meta(model, "compress")
    layers, left = layers_of(model, exclude)
    refuse_none(model, layers, left)
    data = None if data is None else batches_of(data)
    seen = None if data is None else look(model, layers, data)
    counts = next((name for name, share in limits.items() if share is not None), "parameters")
    work = Work(layers, left, seen, plain, counts)
    leave_unseen(model, work)
    work.stacks = stacks_of(model, work.layers, work.left, exclude, data, plain)
    count_stacks(work)
    total = sum(p.numel() for p in named_parameters(model).values())
    if ranks is not None:
        chosen = _by_hand(work, ranks)
    else:
        gather(work, model, data[0] if data else None)
        chosen = _chosen(work, energy, limits[counts], total)
    new: dict[str, nn.Module] = {}
    for name in working(chosen, "factoring", "layers"):
        if name in work.stacks:
            found = work.stacks[name].modules(chosen[name].rank[0])
            new |= {place or name: module for place, module in found.items()}
        else:
            new[name] = _factored(work.layers[name], work.moment(name), chosen[name])
    told = _told(work, chosen, total)
    put(model, {**layers, **in_place(work.stacks)}, new)
    return told


def _by_hand(work: Work, ranks: Mapping[str, int | str]) -> dict[str, Choice]:
    meant = by_hand(ranks, {**work.layers, **work.stacks}, work.left, work.moment)
    chosen = {}
    for name, (form, rank) in meant.items():
        if name in work.stacks:
            chosen[name] = work.choice(name, form, rank, work.stacks[name].lost(rank[0]))
            continue
        solved = FORMS[form].solve(work.layers[name], work.layers[name].weight.double(), work.moment(name))
        chosen[name] = work.choice(name, form, rank, solved.error(rank))
    unnamed = (n for n in [*work.layers, *work.stacks] if n not in chosen)
    work.left |= dict.fromkeys(unnamed, "not named in ranks")
    return chosen


def _chosen(work: Work, energy: float | None, share: float | None, total: int) -> dict[str, Choice]:
    if energy is not None:
        chosen, why = by_energy(work.choices, energy), "no smaller form keeps as much"
    else:
        dense = {n: work.dense(n).cost for n in work.choices}
        whole = total
        if work.counts == "latency":
            whole = sum(dense.values())
        elif work.counts == "flops" and work.seen is not None:
            whole = sum(work.seen.dense.values())
        assert share is not None
        fixed = whole - sum(dense.values())
        low = fixed + least(work.choices, dense)
        if share * whole < low:
            stay = f" ({summary(work.left)} {'stay' if len(work.left) > 1 else 'stays'})" if work.left else ""
            raise ConfigError([
                f"{work.counts}={share}: the smallest ranks of {counted(len(dense), 'layer')} leave "
                f"{low / whole:.3f} of the model{stay}: give at least {low / whole + 5e-4:.3f}."
            ])  # fmt: skip
        chosen = by_budget(work.choices, dense, int(share * whole) - fixed)
        why = "worth its cost as it is"
    for name, some in work.choices.items():
        if name not in chosen:
            work.left.setdefault(name, why if some else "no form saves anything")
    return chosen


def _factored(layer: Layer, moment: Moment, choice: Choice) -> nn.Sequential:
    """The modules of a choice, with its values."""
    solved = FORMS[choice.form].solve(layer, layer.weight.double(), moment)
    modules = empty(layer, choice.form, choice.rank)
    for module, values in zip(modules, solved.weights(choice.rank), strict=True):
        weight = module.weight
        assert isinstance(weight, Tensor)
        weight.copy_(values.reshape(weight.shape))
    return modules


def _told(work: Work, chosen: Mapping[str, Choice], total: int) -> Compressed:
    layers = []
    after, counted, timed = total, None, work.counts == "latency"
    slow = fast = sum(work.times.values())
    if work.seen is not None:
        counted = sum(work.seen.dense.values())
        less = counted
    for name in (n for n in [*work.layers, *work.stacks] if n in chosen):
        choice, dense = chosen[name], work.dense(name)
        after += choice.parameters - dense.parameters
        flops = None
        if work.seen is not None and choice.flops is not None and dense.flops is not None:
            less += choice.flops - dense.flops
            flops = dense.flops // work.seen.count, choice.flops // work.seen.count
        fast += choice.cost - dense.cost
        if (stack := work.stacks.get(name)) is not None:
            kind, shape, readers = "LSTM", stack.shape, tuple(stack.readers)
        else:
            layer = work.layers[name]
            kind, shape, readers = kind_of(layer), tuple(layer.weight.shape), ()
        layers.append(
            CompressedLayer(
                name, kind, shape, choice.form, choice.rank, (dense.parameters, choice.parameters), flops,
                choice.lost**0.5, readers, (dense.cost / 1e6, choice.cost / 1e6) if timed else None,
            )
        )  # fmt: skip
    batches = 0 if work.seen is None else work.seen.count
    both = None if counted is None else (counted // batches, less // batches)
    times = (slow / 1e6, fast / 1e6) if timed else None
    return Compressed(tuple(layers), work.left, (total, after), both, batches, times)
