"""Several adapters made into one: weighted sums, TIES and DARE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.combine_methods import Sum, dense, rank_of, shortened, side_by_side
from lora_lightning.adapters.inject import (
    attach_adapter,
    check_adapter,
    extra_names,
    name_problem,
    refuse_merged,
)
from lora_lightning.adapters.state import (
    Adapter,
    extra_tensors,
    state_of,
    update_of,
    value_for,
    viewed_as_plain,
)
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.methods.shortening import write_update
from lora_lightning.planning.patterns import naming
from lora_lightning.planning.plan import Plan
from lora_lightning.planning.targets import assemble
from lora_lightning.utils.marks import is_number
from lora_lightning.utils.names import submodule
from lora_lightning.utils.tables import truncate_list

DENSE = ("ties", "dare_linear", "dare_ties")  # methods that look at single entries of the updates
METHODS = ("linear", "svd", *DENSE)


def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    into: str,
    method: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Make a new adapter of several. It is not selected.

    With Δ an adapter's whole update s·B·A and w its weight, the new update is

    - `linear`: Σ w·Δ, exactly: the ranks are laid side by side, and their sum is the new rank.
    - `svd`: Σ w·Δ, the best approximation of rank `rank`.
    - `ties`: of each Δ the largest entries stay, `density` of all its entries over all layers; the sign
      of their sum is elected, and w·Δ is averaged over the adapters that agree with it (Yadav et al.
      2023, arXiv 2306.01708, section 4; there all weights are one number λ and density is 0.2).
    - `dare_linear`: each entry is dropped with probability 1 - `density` and what stays divided by
      `density`, then Σ w·Δ (Yu et al. 2024, arXiv 2311.03099, section 3).
    - `dare_ties`: the same, with the signs elected and averaged as in TIES.

    The last three and `svd` end with a singular value decomposition to `rank`. Heads, norms and biases
    are averages with the same weights, Σ w·v / Σ w.

    Args:
        model: the module that was given to `inject` (with LoRACallback, the LightningModule).
        names: adapters of the model.
        weights: one for each.
        into: name of the new adapter.
        method: one of the five above.
        rank: of every layer but those with a smaller side; None is the largest of the adapters' ranks
            there. Not for `linear`.
        density: fraction of the entries that stay, above 0 and at most 1, for TIES and DARE.
        seed: for DARE.

    Returns:
        For each layer the relative error ‖Σ - B·A‖ / ‖Σ‖ (Frobenius) of the new update.

    Raises:
        UserError: an adapter that the model does not have; the model is not adapted, or merged.
        ConfigError: bad options, every problem at once; an adapter with DoRA, whose update is no product
            of two thin matrices. The model is untouched.
    """
    refuse_merged(model)
    state = state_of(model)
    records = [state.named(name) for name in names]
    problems = _options(method, rank, density)
    check_sources(model, records, names, weights, into, problems)
    sums = collect(model, names, records)
    if method in DENSE:
        merged = dense(sums, list(weights), method, cast(float, density), seed)
        factors = {n: shortened(d, rank_of(sums[n], rank)) for n, d in merged.items()}
    else:
        thin = {n: side_by_side(s, list(weights)) for n, s in sums.items()}
        factors = {
            n: (left, right, 0.0)
            if method == "linear" and left.shape[-1] <= sums[n].side
            else shortened((left, right), sums[n].side if method == "linear" else rank_of(sums[n], rank))
            for n, (left, right) in thin.items()
        }
    ranks = {n: left.shape[-1] for n, (left, _, _) in factors.items()}
    config, planned = planned_sum(model, records, sums, ranks)
    values = averages(model, names, list(weights), config, planned)
    attach_adapter(model, config, planned, into)
    for name, (left, right, _) in factors.items():
        write_update(update_of(model, sums[name].layer, into), left, right)
    state.adapters[into].values.update(values)
    return {name: error for name, (_, _, error) in factors.items()}


def check_sources(
    model: nn.Module,
    records: list[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    into: str,
    others: Sequence[str] = (),
) -> None:
    """Refuse adapters that have no sum, weights that are none, and a name that cannot be.

    Args:
        others: problems that are told with these.

    Raises:
        ConfigError: every problem at once.
    """
    if not hasattr(weights, "__len__"):
        raise ConfigError([f"weights={weights!r}: give a list, with one number for each of {list(names)!r}."])
    problems = []
    if not records or len(names) != len(weights):
        problems.append(f"weights={list(weights)!r}: give one for each of {list(names)!r}, at least one.")
    if not all(map(is_number, weights)):
        problems.append(f"weights={list(weights)!r}: give finite numbers.")
    if problem := name_problem(into):
        problems.append(problem.replace("adapter=", "into="))
    elif into in state_of(model).adapters:
        problems.append(f"into={into!r}: the model has an adapter of this name; give another.")
    problems += others
    if dora := [n for n, r in zip(names, records, strict=True) if r.config.use_dora]:
        problems.append(
            f"names: {truncate_list(dora)} use DoRA, which rescales the weight itself and is no sum of low "
            "rank: combine adapters with use_dora=False."
        )
    if problems:
        raise ConfigError(problems)
    check_adapter(model, records[0].config, into)


def _options(method: str, rank: int | None, density: float | None) -> list[str]:
    """What is wrong with how to combine."""
    problems = []
    if method not in METHODS:
        problems.append(
            f"method={method!r}: give one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}"
        )
    if rank is not None and (method == "linear" or not isinstance(rank, int) or rank < 1):
        problems.append(
            f"rank={rank!r}: give a whole number of at least 1; linear is exact and takes none, method='svd' "
            "truncates."
        )
    if method in DENSE and not (isinstance(density, (int, float)) and 0 < density <= 1):
        problems.append(
            f"density={density!r}: {method} drops entries: give the fraction that stays, above 0 and "
            "at most 1; 0.2 is usual for TIES, 0.1 to 0.5 for DARE."
        )
    if method not in DENSE and density is not None:
        problems.append(f"density={density!r}: {method} drops no entries; leave it out.")
    return problems


@torch.no_grad()
def collect(model: nn.Module, names: Sequence[str], records: list[Adapter]) -> dict[str, Sum]:
    """The terms for each place. Where one adapter updates a whole weight and another some of its rows,
    the rows are written as an update of the whole."""
    plans = [(i, layer) for i, record in enumerate(records) for layer in record.plan.layers]
    slots = [update_of(model, layer, names[i]).slot for i, layer in plans]
    whole = {
        (layer.module, slot.parameter): layer
        for (_, layer), slot in zip(plans, slots, strict=True)
        if slot.out_range is None
    }
    sums: dict[str, Sum] = {}
    for (i, layer), slot in zip(plans, slots, strict=True):
        left, right = update_of(model, layer, names[i]).thin_factors()
        place = whole.get((layer.module, slot.parameter), layer)
        if place.slot != layer.slot and slot.out_range is not None:
            left = F.pad(left, [0, 0, slot.out_range[0], place.shape[0] - slot.out_range[1]])
            slot = replace(slot, out_range=None)
        total = sums.setdefault(place.name, Sum(place, slot.highest_rank(place.shape), []))
        total.terms.append((i, left, right))
    return sums


def planned_sum(
    model: nn.Module, records: list[Adapter], sums: dict[str, Sum], ranks: dict[str, int]
) -> tuple[LoRAConfig, Plan]:
    """A configuration and a plan under which the new adapter's scaling is 1 everywhere."""
    backbone = records[0].plan.backbone
    prefix = f"{backbone}." if backbone else ""
    layers = []
    for name, total in sums.items():
        _, left, right = total.terms[0]
        layers.append(
            replace(
                total.layer,
                name=name.removeprefix(prefix),
                module=total.layer.module.removeprefix(prefix),
                rank=ranks[name],
                alpha=float(ranks[name]),
                asked=None,
                fixed=0,
                mixed=(),
                parameters=ranks[name] * left.shape[0] * (left.shape[1] + right.shape[2]),
            )
        )
    heads = list(dict.fromkeys(h.removeprefix(prefix) for r in records for h in r.plan.heads))
    configs = [r.config for r in records]
    norms = {c.train_norm for c in configs} - {"frozen"}
    config = replace(
        configs[0],
        rank=max([*ranks.values(), 1]),
        alpha=None,
        exclude_modules=None,
        dropout=0.0,
        init="default",
        restarts=0,
        budget=None,
        use_rslora=False,
        train_bias=max((c.train_bias for c in configs), key=("none", "lora_only", "all").index),
        train_norm="both" if len(norms) > 1 else next(iter(norms), "frozen"),
        fold_norms=configs[0].fold_norms and not norms,
    )
    skipped = {n.removeprefix(prefix): r for n, r in records[0].plan.skipped.items() if n not in sums}
    with viewed_as_plain(model):
        config = naming(config, layers, heads, submodule(model, backbone))
        return config, assemble(model, config, backbone, heads, layers, skipped)


@torch.no_grad()
def averages(
    model: nn.Module, names: Sequence[str], weights: list[float], config: LoRAConfig, planned: Plan
) -> dict[str, Tensor]:
    """Σ w·v / Σ w of the model's own tensors that the new adapter trains; an adapter that does not train
    one has the base's value."""
    state = state_of(model)
    with viewed_as_plain(model):
        own = extra_tensors(model, extra_names(model, config, planned))
    averages = {}
    for name, tensor in own.items():
        values = [value_for(state, adapter, name, tensor).detach() for adapter in names]
        if all(torch.equal(v, values[0]) for v in values):
            averages[name] = values[0].clone()
            continue
        if sum(weights) <= 0 or min(weights) < 0:
            raise ConfigError([
                f"weights={weights!r}: {name} differs between the adapters, and an average needs weights "
                "of at least 0: train the adapters with modules_to_save=None, or give such weights."
            ])  # fmt: skip
        weighted = torch.stack([w * v.double() for w, v in zip(weights, values, strict=True)])
        mean = weighted.sum(0) / sum(weights)
        averages[name] = (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)
    return averages
