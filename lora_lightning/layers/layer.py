"""LoRALayer: what every adapted layer shares: its updates, weights that tell the truth, merging."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lightning.errors import UserError
from lora_lightning.layers.rows import Rows
from lora_lightning.layers.swap import Swapped, swap_in, swap_out, swapped_class
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.layers.writing import inverted
from lora_lightning.quantized import QuantizedTensor
from lora_lightning.sharding import is_shard


class LoRALayer(Swapped):
    """Mixin for a module some of whose parameters are adapted; by itself it is the general road.

    Reading an adapted parameter, such as `layer.weight`, gives the effective weight W + sum of the
    active updates, wherever it is read; the base weight keeps its place in `_parameters`, and so its
    name in `state_dict()`. The module's own forward reads it like everybody else. Families whose
    forward is known take a low-rank branch instead, which never forms a gradient of W.

    Attributes:
        lora: adapter name -> slot name -> LowRankUpdate.
        lora_active: names of the adapters in use, of those that the layer has.
        lora_originals: the base parameters while the updates are merged into the weights; of a
            parametrized one those that it is computed from, as `parametrizations.weight.original0`.
        lora_rows: within `adapters_for`, which says the adapters of the rows the layer is called with.
        has_branch: whether the family's forward adds branches, which dropout needs.
    """

    prefix = "LoRA"
    has_branch = False
    lora: nn.ModuleDict
    lora_active: tuple[str, ...]
    lora_originals: dict[str, nn.Parameter | None]
    lora_rows: Rows | None = None

    def read(self, name: str) -> Tensor:
        # An AttributeError in here would make nn.Module fall back to the base weight, silently.
        if f"lora_merged_{name}" in self._buffers:
            return cast(Tensor, self._buffers[f"lora_merged_{name}"])
        weight, updates = self.base(name), self.active_updates(name)
        return effective_weight(weight, updates) if updates and not is_shard(weight) else weight

    def base(self, name: str) -> Tensor:
        """W: the parameter, or what the module's own parametrization makes of it; after
        `merge_updates` a parameter holds the merged values."""
        for place in (self._parameters, self.__dict__):  # the second under FSDP, between its states
            if name in place:
                return cast(Tensor, place[name])
        return getattr(self.original_class, name).fget(self)

    def reset_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Begin anew, as when a model on the meta device is given memory: the base weights by the
        module's own method, if it has one, then the updates."""
        self._reset("reset_parameters", *args, **kwargs)

    def _reset_parameters(self, *args: Any, **kwargs: Any) -> None:
        """The same, under the name that it has in nn.MultiheadAttention."""
        self._reset("_reset_parameters", *args, **kwargs)

    def _reset(self, method: str, *args: Any, **kwargs: Any) -> None:
        active, self.lora_active = self.lora_active, ()  # so that it meets the base weights
        try:
            if hasattr(self.original_class, method):
                getattr(self.original_class, method)(self, *args, **kwargs)
        finally:
            self.lora_active = active
        for update in (u for adapter in self.lora for u in self.updates(adapter)):
            update.reset_parameters()
            update.reset_magnitude(update.slot.of(self.base(update.slot.parameter)))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """An empty tensor stands for a frozen weight that a checkpoint leaves out."""
        for name in self.properties:
            if isinstance(stored := state.get(prefix + name), Tensor) and not stored.numel():
                del state[prefix + name]
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def merged(self) -> bool:
        return bool(self.lora_originals)

    def active_updates(self, name: str) -> list[LowRankUpdate]:
        """The updates of the parameter `name` that are to be added; none when they are merged."""
        if self.merged:
            return []
        active = self.lora_active if self.lora_rows is None else self.lora_rows.active(self, self.lora)
        return [u for adapter in active for u in self.updates(adapter) if u.slot.parameter == name]

    def updates(self, adapter: str) -> list[LowRankUpdate]:
        """The updates that make up one adapter."""
        return list(cast(nn.ModuleDict, self.lora[adapter]).values())  # type: ignore[arg-type]

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """The effective weights by name, in their own dtype, the sum taken in float32 or better.

        Raises:
            UserError: an update is not finite.
        """
        merged = self.present_weights()
        for name, weight in merged.items():
            if not torch.isfinite(weight).all() and torch.isfinite(self.base(name)).all():
                raise UserError("the update holds NaN or infinity and cannot be merged")
        return merged

    def present_weights(self) -> dict[str, Tensor]:
        """The values that reading the adapted parameters gives now, by name."""
        return {name: self.read(name).detach() for name in self.properties}

    def merge_updates(self, merged: dict[str, Tensor]) -> list[str]:
        """Put `merged_weights()` in the place of the base weights, which `unmerge_updates` restores.

        A new parameter takes the place, so that another module tied to the old one is not changed. What the
        module's own parametrization computes is written into its originals.

        Returns:
            The names of those that no originals give: they are merged, but not in `state_dict()`.
        """
        hidden = []
        for name, weight in merged.items():
            places: dict[str, Tensor] | None = {name: weight}
            if is_parametrized(self, name):
                originals = inverted(self, name, weight)
                places = originals and {f"parametrizations.{name}.{n}": t for n, t in originals.items()}
            if places is None:
                self.register_buffer(f"lora_merged_{name}", weight, persistent=False)
                self.lora_originals[name] = None
                hidden.append(name)
                continue
            for place, value in places.items():
                module, leaf = self._place(place)
                original = cast(nn.Parameter, module._parameters[leaf])
                # as a buffer the base weight follows the module to another device
                module.register_buffer(f"lora_unmerged_{leaf}", original.data, persistent=False)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                self.lora_originals[place] = original
        return hidden

    def unmerge_updates(self) -> None:
        """Put the base weights back, bit for bit."""
        for place, original in self.lora_originals.items():
            if original is None:
                delattr(self, f"lora_merged_{place}")
                continue
            module, leaf = self._place(place)
            original.data = kept = cast(Tensor, module._buffers[f"lora_unmerged_{leaf}"])
            if isinstance(original, QuantizedTensor):  # `data` is no more than the outside of one
                original.codes, original.scales = kept.codes, kept.scales  # type: ignore[attr-defined]
            delattr(module, f"lora_unmerged_{leaf}")
            module._parameters[leaf] = original
        self.lora_originals.clear()

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module, this one or a part of it, and the leaf that such a name of a parameter means."""
        path, _, leaf = name.rpartition(".")
        return self.get_submodule(path), leaf


def effective_weight(weight: Tensor, updates: list[LowRankUpdate]) -> Tensor:
    """W + sum of the updates, in W's dtype; the sum is taken in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    effective = weight.to(dtype)
    for update in updates:
        rows = update.slot.rows
        if rows is None and len(updates) == 1:
            return update.added_to(effective).to(weight.dtype)
        delta = update.delta(update.slot.of(weight))
        if rows is not None:
            below = weight.shape[0] - rows[1]
            delta = nn.functional.pad(delta, [0, 0] * (weight.dim() - 1) + [rows[0], below])
        effective = effective + delta
    return effective.to(weight.dtype)


def adapt(module: nn.Module, family: type[LoRALayer], slots: dict[str, LowRankUpdate], adapter: str) -> None:
    """Give `module` an adapter, which is not active yet; a plain module becomes a layer of `family`.

    Args:
        slots: the adapter's updates by slot name.
    """
    parameters = {update.slot.parameter for update in slots.values()}
    if not isinstance(module, LoRALayer):
        swap_in(module, family)
        module.lora = nn.ModuleDict().train(module.training)
        module.lora_active = ()  # type: ignore[assignment]
        module.lora_originals = {}  # type: ignore[assignment]
    layer = cast(LoRALayer, module)
    layer.lora[adapter] = nn.ModuleDict(slots).train(layer.training)
    _compute(layer, parameters | {*layer.properties})


def forget(layer: LoRALayer, adapter: str) -> None:
    """Take one adapter, which is not active, from the layer; the last one gives it its class back."""
    del layer.lora[adapter]
    if layer.lora:
        updates = [u for other in layer.lora for u in layer.updates(other)]
        _compute(layer, {update.slot.parameter for update in updates})
    else:
        restore(layer)


def restore(layer: LoRALayer) -> None:
    """Undo `adapt` for all adapters: the layer has its class and attributes of before."""
    swap_out(layer)
    for name in ("lora_active", "lora_originals"):
        del layer.__dict__[name]
    del layer._modules["lora"]
    _refresh(layer)


def _compute(layer: LoRALayer, parameters: set[str]) -> None:
    """Give the layer the class that computes these parameters, which some adapter updates."""
    names = tuple(sorted(parameters))
    layer.__class__ = swapped_class(layer.mixin_class, layer.original_class, names)  # type: ignore[assignment]
    _refresh(layer)


def _refresh(layer: nn.Module) -> None:
    """A recurrent module keeps a list of its weights, as they were when it made it."""
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def slot_key(slot: str) -> str:
    """A slot's name as a key of `lora[adapter]`: "" is `weight`, `in_proj.q` is `in_proj_q`."""
    return slot.replace(".", "_") or "weight"
