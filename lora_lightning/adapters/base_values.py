"""What is made from base values follows them when they arrive after the injection: the values of before
training of heads, norms and biases, what adapters that have not trained begin with, inits that are made of
weights, and DoRA's magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.state import ADVICE, AdapterState, extra_tensors, state_of
from lora_lightning.errors import UserError
from lora_lightning.layers.norm import is_norm
from lora_lightning.layers.registry import LoRALayer, base_modules, lora_layers
from lora_lightning.methods.inits import INITS, begin
from lora_lightning.utils.names import joined, named_parameters, stored_name
from lora_lightning.utils.sharding import is_flattened, is_shard, is_sharded
from lora_lightning.utils.tables import truncate_list


@dataclass
class Follower:
    """What the hooks of one model know of the `load_state_dict` in progress.

    Attributes:
        plain: whether the state holds base weights alone. One with updates is an adapted model's, whose heads
            are trained ones.
        unchanged: of each own tensor that is loaded, the adapters that have its base value still.
        load: the list of missing keys of that `load_state_dict`, by whose identity it is known.
    """

    state: AdapterState
    plain: bool = False
    unchanged: dict[str, list[str]] = field(default_factory=dict)
    load: list[str] | None = None


def follow_base(model: nn.Module) -> None:
    """Watch every `load_state_dict` of the model, of a module around it or of one in it, from now on.

    Plain weights are the base's wherever and whenever they are loaded. Calling it again takes in what has
    been adapted since.
    """
    leave_base(model)
    state = state_of(model)
    follower = Follower(state)
    own = extra_tensors(model, dict.fromkeys(n for a in state.adapters.values() for n in a.extra_trainables))
    names = {id(tensor): name for name, tensor in own.items()}
    modules = dict(base_modules(model))
    watched: dict[str, dict[str, str]] = {}
    for path, module in modules.items():
        leaves = {leaf: names[id(t)] for leaf, t in _tensors(module).items() if id(t) in names}
        if leaves or isinstance(module, LoRALayer):
            watched[path] = leaves
    for path in list(watched):  # one above sees a whole state, of which the module has its own part
        parts = path.split(".")
        for above in (".".join(parts[:i]) for i in range(len(parts))):
            watched.setdefault(above, {})
    for path, leaves in watched.items():
        module = modules[path]
        module.register_load_state_dict_pre_hook(partial(_before_load, follower, leaves, not path))
        module.register_load_state_dict_post_hook(partial(_after_load, follower, leaves))


def leave_base(model: nn.Module) -> None:
    """Watch no more."""
    for module in model.modules():
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                function = getattr(hook, "hook", hook)  # torch wraps those that take the module
                if isinstance(function, partial) and function.func in (_before_load, _after_load):
                    del hooks[key]


def replaced(model: nn.Module) -> list[str]:
    """The adapted layers, and the owners of the model's own trained tensors, in whose places other modules
    stand now; norm layers do not count, which other tools convert."""
    state, layers = state_of(model), lora_layers(model)
    others = [
        planned.module or type(model).__name__
        for adapter, record in state.adapters.items()
        for planned in record.plan.layers
        if adapter not in getattr(layers.get(planned.module), "lora", ())
    ]
    names = dict.fromkeys(n for a in state.adapters.values() for n in a.extra_trainables)
    found = extra_tensors(model, names)
    others += [n.rpartition(".")[0] for n in names if n not in found]
    kept = state.originals
    others += [n.rpartition(".")[0] for n, t in found.items() if n in kept and kept[n].shape != t.shape]
    owned = {id(t): n.rpartition(".")[0] for n, t in found.items()}
    for _, module in base_modules(model):
        if not (_is_watched(module) or is_norm(module)):
            others += [owned[id(t)] for t in _tensors(module).values() if id(t) in owned]
    return list(dict.fromkeys(others))


def refuse_replaced(model: nn.Module) -> None:
    """Refuse to go on with a model that has lost what the plan names.

    Raises:
        UserError: as `replaced` says; the model is untouched.
    """
    if not is_sharded(model) and (others := replaced(model)):
        raise UserError(
            f"{truncate_list(others)}: another module, or a weight of another shape, was put here after the "
            "injection, and what was adapted or trained in this place is gone. Call "
            "lora_lightning.eject(model), replace it, and inject again; what a LightningModule's own setup "
            "or configure_model replaces is replaced in time."
        )


def refuse_meta(model: nn.Module, action: str) -> None:
    """Refuse what needs values.

    Raises:
        UserError: the model, or a part of it, is on the meta device; nothing was done.
    """
    if meta := [n for n, p in named_parameters(model).items() if p.is_meta]:
        raise UserError(
            f"{action}: {truncate_list(meta, most=3)} have no memory yet (meta device): give it to them, "
            "model.to_empty(device=...), and load the model's weights first."
        )


def _is_watched(module: nn.Module) -> bool:
    """Whether the hooks are on this very module."""
    hooks = module._load_state_dict_post_hooks.values()
    return any(isinstance(hook, partial) and hook.func is _after_load for hook in hooks)


@torch.no_grad()
def begin_training(model: nn.Module) -> None:
    """The last moment at which what stands in the model is the base's, unless a checkpoint or an adapter was
    loaded: take it, what no hook has seen arriving too."""
    state = state_of(model)
    if not state.begun:
        follower = Follower(state)
        for name, tensor in extra_tensors(model, state.originals).items():
            follower.unchanged[name] = _with_base_value(state, name, tensor)
            _follow(follower, name, tensor)
    begin_updates(model)
    state.begun = True


@torch.no_grad()
def begin_updates(model: nn.Module) -> None:
    """Updates that are zero still begin from the base weights of now: DoRA's magnitudes as their norms, and A
    and B where the init is made of them, unless a checkpoint or an adapter has been loaded."""
    begun = state_of(model).begun
    for layer in lora_layers(model).values():
        _begin_updates(layer, begun)


def _before_load(
    follower: Follower, leaves: Mapping[str, str], top: bool, module: nn.Module, state_dict: dict[str, Any],
    prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any,
) -> None:  # fmt: skip
    if missing is not follower.load:  # one list a load, of which the outermost module sees all
        follower.load = missing
        _begin(follower, module, top, state_dict, prefix)
    if follower.plain:
        for leaf, name in leaves.items():
            stored = state_dict.get(prefix + leaf)
            tensor = _tensors(module).get(leaf)
            if tensor is not None and isinstance(stored, Tensor) and stored.shape == tensor.shape:
                follower.unchanged[name] = _with_base_value(follower.state, name, tensor)


def _begin(
    follower: Follower, module: nn.Module, top: bool, state_dict: Mapping[str, Any], prefix: str
) -> None:
    state = follower.state
    restored = top and state.restoring
    state.restoring = state.restoring and not top
    follower.plain, follower.unchanged = False, {}
    if is_flattened(module) or is_sharded(module):
        return
    layers = lora_layers(module)

    def stored(name: str) -> Any:
        return state_dict.get(prefix + stored_name(module, name))

    _refuse_into_merged(layers, stored)
    adapted = any(stored(n) is not None for n in _update_names(layers)) or prefix + ADVICE in state_dict
    if not any(record.plan.layers for record in state.adapters.values()):
        # A linear probe has no updates by which its checkpoints are told: they hold the base that is here.
        frozen = {n: p for n, p in named_parameters(module).items() if not p.requires_grad}
        adapted = not any(_differs(stored(n), p) for n, p in frozen.items())
    follower.plain = not (restored or adapted)
    state.begun = state.begun or not follower.plain


@torch.no_grad()
def _after_load(follower: Follower, leaves: Mapping[str, str], module: nn.Module, incompatible: Any) -> None:
    if not follower.plain:
        return
    for leaf, name in leaves.items():
        tensor = _tensors(module).get(leaf)
        if tensor is not None and name in follower.unchanged:
            _follow(follower, name, tensor)
    if isinstance(module, LoRALayer):
        _begin_updates(module, follower.state.begun)


def _follow(follower: Follower, name: str, tensor: Tensor) -> None:
    state = follower.state
    holders = [state.adapters[adapter].values for adapter in follower.unchanged.pop(name)]
    if name in state.originals:
        holders.append(state.originals)
    with state.choice.lock:
        for values in holders:
            if values[name].dtype == tensor.dtype and values[name].device == tensor.device:
                values[name].copy_(tensor)  # some thread may see this very tensor now
            else:
                values[name] = tensor.detach().clone()
        state.choice.version += 1


def _with_base_value(state: AdapterState, name: str, standing: Tensor) -> list[str]:
    """The adapters, but for the one whose values stand in the model, that have the tensor's base value."""
    base = state.originals.get(name, standing)
    return [
        adapter
        for adapter, record in state.adapters.items()
        if adapter not in state.active[:1] and name in record.values and _same(record.values[name], base)
    ]


def _tensors(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.device, other.dtype), other)


def _begin_updates(layer: LoRALayer, begun: bool) -> None:
    for update in (u for adapter in layer.lora for u in layer.updates(adapter)):
        made = update.init in INITS and not begun
        if layer.lora_merged or not (made or update.lora_magnitude is not None):
            continue
        B = update.lora_B
        if is_shard(B) or B.is_meta or not update.is_zero():
            continue
        weight = update.slot.of(layer.base_weight(update.slot.parameter))
        if made:
            begin(update, weight, layer.lora_path, getattr(layer, "padding_idx", None))
        update.reset_magnitude(weight)


def _update_names(layers: Mapping[str, LoRALayer]) -> Iterator[str]:
    for name, layer in layers.items():
        yield from (n for n, _ in layer.lora.named_parameters(prefix=joined(name, "lora")))


def _refuse_into_merged(layers: Mapping[str, LoRALayer], stored: Callable[[str], Any]) -> None:
    """A merged layer keeps its base weight beside the merged one: what is loaded would be neither of them."""
    others = []
    for name, layer in layers.items():
        if layer.lora_merged:
            merged = (*layer.properties, "parametrizations.", "lora.")  # the other parameters are not
            here = {n: p for n, p in layer.named_parameters() if n.startswith(merged)}
            there = {joined(name, n): p for n, p in here.items()}
            others += [n for n, p in there.items() if _differs(stored(n), p)]
    if others:
        raise UserError(
            f"the adapters are merged into the weights, and {truncate_list(others)} would be loaded over "
            "them: call "
            "lora_lightning.unmerge(model) first, load, and merge again. Nothing was loaded."
        )


def _differs(stored: Any, present: Tensor) -> bool:
    return isinstance(stored, Tensor) and bool(stored.numel()) and not _same(stored, present)
