"""An adapter's file shrunk without its base: the factors hold all that is needed."""

from __future__ import annotations

from dataclasses import replace

from lora_lightning.errors import UserError
from lora_lightning.files.format import SavedAdapter
from lora_lightning.methods.shortening import Approximation, as_factors, plainly, shortened
from lora_lightning.planning.patterns import keyed
from lora_lightning.utils.pattern_kinds import exactly


def shrunk(
    saved: SavedAdapter, rank: int | None, energy: float | None, budget: int | None
) -> tuple[SavedAdapter, Approximation]:
    """The adapter as `shrink` would leave it, and what was lost.

    Raises:
        ConfigError, UserError: as `shrink`; or it is in PEFT's format, which leaves open what only a model
            can tell.
    """
    if saved.foreign:
        raise UserError(
            "the adapter is in PEFT's format, which leaves open what only its model can tell: load it with "
            'lora_lightning.load_adapter, shrink(model, …), save_adapter(model, folder, format="peft").'
        )
    layers, slots = saved.plan.layers, saved.slots
    factors = {p.name: saved.thin_factors(p) for p in layers}
    short = shortened(saved.config, layers, slots, factors, rank, energy, budget)
    names, prefix = saved.update_names(), f"{saved.plan.backbone}." if saved.plan.backbone else ""
    tensors = {n: t for n, t in saved.tensors.items() if n not in names}
    for layer in short.layers:
        scaling = saved.config.scaling(layer.rank, layer.alpha)
        made = as_factors(*short.factors[layer.name], slots[layer.name], layer.shape, scaling)
        for part, tensor in zip(("lora_A", "lora_B"), made, strict=True):
            tensors[layer.tensor(part)] = tensor.to(saved.tensors[layer.tensor(part)].dtype)
    config = keyed(
        plainly(saved.config, short.layers),
        short.layers,
        saved.plan.heads,
        lambda name: exactly(name.removeprefix(prefix)),
    )
    kept = {p.name: slots[p.name] for p in short.layers}
    gone = {p.name: "its update was shrunk away" for p in layers if p.name not in kept}
    now = sum(p.parameters for p in short.layers)
    fixed = sum(p.parameters // p.rank * p.fixed for p in layers)
    trained = sum(p.parameters for p in layers)
    plan = replace(
        saved.plan,
        layers=short.layers,
        skipped={**saved.plan.skipped, **gone},
        trainable=saved.plan.trainable - trained + now,
        total=saved.plan.total - trained - fixed + now,
    )
    return replace(saved, config=config, plan=plan, tensors=tensors, slots=kept), short.told
