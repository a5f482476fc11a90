"""What PEFT's files leave open, settled by the model that they are loaded into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lora_lightning.files.format import SavedAdapter
from lora_lightning.files.peft_read import MERGE_IN_PEFT, refuse_peft
from lora_lightning.layers.registry import slots_of
from lora_lightning.layers.slot import Slot
from lora_lightning.layers.update import FIXED, LowRankUpdate
from lora_lightning.methods.inits import begin
from lora_lightning.planning.patterns import naming
from lora_lightning.planning.plan import LayerPlan, Plan
from lora_lightning.utils.names import inside, named_modules


def in_model(saved: SavedAdapter, model: nn.Module, where: str | os.PathLike[str]) -> SavedAdapter:
    """What a PEFT file leaves open, settled by the model (plain, with the names of `saved`): kinds of
    layers, weights of (in, out), and patterns that mean the file's layers alone.

    Raises:
        AdapterFileError: a layer that PEFT computes in another way than its weight says.
    """
    modules = named_modules(model)
    problems: list[str] = []
    tensors, slots, layers = dict(saved.tensors), dict(saved.slots), []
    for layer in saved.plan.layers:
        module = modules.get(layer.module)
        if module is None:
            layers.append(layer)  # named when the names are checked
            continue
        if problem := foreign_computation(module):
            problems.append(f"{layer.module}: {problem}")
        shape = layer.shape
        if type(module).__name__ == "Conv1D" and not layer.slot:
            slots[layer.name] = slots_of(layer.module, module)[""]
            tensors[layer.tensor("lora_B")] = tensors[layer.tensor("lora_B")].t().contiguous()
            shape = (shape[1], shape[0])
        layers.append(
            LayerPlan(
                layer.name, layer.module, layer.slot, type(module).__name__, shape, layer.rank, layer.alpha,
                layer.parameters,
            )
        )  # fmt: skip
        if saved.config.use_dora and (
            slots[layer.name].transposed or isinstance(module, nn.MultiheadAttention)
        ):
            problems.append(
                f"{layer.name}: DoRA of a weight of (in, out) does not exist here. {MERGE_IN_PEFT}"
            )
    refuse_peft(problems, where)
    total = sum(p.numel() for p in model.parameters()) + sum(p.parameters for p in layers)
    plan = Plan(layers, saved.plan.heads, {}, saved.plan.backbone, saved.plan.trainable, total)
    config = naming(saved.config, layers, plan.heads, model)
    return replace(saved, config=config, plan=plan, tensors=tensors, slots=slots)


def with_beginning(
    saved: SavedAdapter, weight_of: Callable[[LayerPlan], Tensor], where: str | os.PathLike[str]
) -> SavedAdapter:
    """The adapter for the base as it was. PiSSA and OLoRA of PEFT take the B0·A0 at which the updates begin
    off the base's weights; it follows from these, and here the fixed part of each update takes it off.

    Args:
        weight_of: the weight of a layer, or the rows of it, before PEFT changed it.

    Raises:
        AdapterFileError: a layer for which PEFT has no such init.
    """
    if not saved.on_residual:
        return saved
    init, tensors, layers = saved.config.init, dict(saved.tensors), []
    problems = [
        f"{layer.name}: PEFT's {init} of such a layer is not known here. {MERGE_IN_PEFT}"
        for layer in saved.plan.layers
        if not _is_linear(layer, saved.slots[layer.name], init)
    ]
    refuse_peft(problems, where)
    for layer in saved.plan.layers:
        weight, scaling = weight_of(layer).detach(), saved.config.scaling(layer.rank, layer.alpha)
        update = LowRankUpdate(
            weight, saved.slots[layer.name], layer.rank, scaling, init=init, fixed=layer.rank
        )
        begin(update, weight, layer.name)
        for part in FIXED:
            tensors[layer.tensor(part)] = getattr(update, part).detach()
        layers.append(replace(layer, fixed=layer.rank))
    return replace(saved, plan=replace(saved.plan, layers=layers), tensors=tensors)


def _is_linear(layer: LayerPlan, slot: Slot, init: str) -> bool:
    """Whether it is such a layer as PEFT has these inits of; OLoRA's not of a weight of (in, out)."""
    table, turned = slot.zero == "A", slot.transposed and init == "olora"
    return len(layer.shape) == 2 and not (layer.slot or table or turned) and layer.rank <= min(layer.shape)


def only_trained(saved: SavedAdapter, own: Iterable[str], base_weights: Mapping[str, Tensor]) -> SavedAdapter:
    """The tensors of an adapter from PEFT as one of ours has them: PEFT saves whole modules, also what is
    not trained in them, and leaves out biases that are not called `bias`.

    Args:
        own: names of the model's tensors that such an adapter trains.
        base_weights: all of the model's tensors, as before training.
    """
    own, tensors = set(own), dict(saved.tensors)
    for name in saved.tensors.keys() & base_weights.keys() - own:
        if _equal(base_weights[name], tensors[name]):
            del tensors[name]
    for name in own - tensors.keys():
        if "bias" in name.rpartition(".")[2] and not inside(name, saved.plan.heads):
            tensors[name] = base_weights[name].detach().clone()
    return replace(saved, tensors=tensors)


def foreign_computation(module: nn.Module) -> str | None:
    """Why PEFT's update of a layer is not s·B·A on its weight, or None when it is."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    if module.groups != 1:
        return f"a convolution in {module.groups} groups, where PEFT's A mixes the groups"
    if any(d != 1 for d in module.dilation):
        return f"dilation {module.dilation[0]}, which PEFT leaves out of its update"
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r}, which PEFT leaves out of its update"
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.cpu().float() == other.cpu().float()).all())
