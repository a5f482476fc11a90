"""LoRALayer: what every adapted layer shares: its updates, weights that tell the truth, merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lightning.errors import UserError
from lora_lightning.kernels.merge import Factored
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.kernels.together import Factors, Together
from lora_lightning.layers.size import resized
from lora_lightning.layers.swap import ClassSwap, give_class, swap_class, swap_out, swapped_class
from lora_lightning.layers.update import LowRankUpdate, effective_weight
from lora_lightning.layers.views import Choice, View
from lora_lightning.layers.writing import inverted
from lora_lightning.utils.sharding import is_shard

# Attributes that an adapted layer has for as long as it is adapted.
OWN = ("lora_active", "lora_alone", "lora_used", "lora_merged", "lora_originals", "lora_choice", "lora_path",
       "lora_norm")  # fmt: skip


class LoRALayer(ClassSwap):
    """Mixin for a module some of whose parameters are adapted; by itself it is the general road.

    Reading an adapted parameter, such as `layer.weight`, gives the effective weight W + sum of the
    active updates, wherever it is read; the base weight keeps its place in `_parameters`, and so its
    name in `state_dict()`. The module's own forward reads it like everybody else. Families whose
    forward is known take a low-rank branch instead, which never forms a gradient of W.

    Attributes:
        lora: adapter name -> slot name -> LowRankUpdate.
        lora_active: names of the adapters in use, of those that the layer has.
        lora_merged: whether their updates are merged into the weights.
        lora_alone: adapter and slot of the one update to be added, where it is one of the whole weight: what
            the choice of adapters comes to, computed when it is made.
        lora_used: adapters and slots of all updates to be added, by the parameter.
        lora_originals: the base parameters while they are; of a parametrized one those that it is computed
            from, as `parametrizations.weight.original0`.
        lora_choice: of the model: whether some thread or task sees it otherwise.
        lora_path: the layer's name in the model.
        lora_norm: the frozen norm behind, which a convolution may do the work of: `folding.NormBehind`.
        has_branch: whether the family's forward adds branches, which dropout needs.
    """

    prefix = "LoRA"
    keeps_state = True
    has_branch = False
    lora: nn.ModuleDict
    lora_active: tuple[str, ...]
    lora_merged: bool
    lora_alone: tuple[str, str] | None
    lora_used: dict[str, tuple[tuple[str, str], ...]]
    lora_originals: dict[str, nn.Parameter | None]
    lora_choice: Choice
    lora_path: str

    def read(self, name: str) -> Tensor:
        # An AttributeError in here would make nn.Module fall back to the base weight, silently.
        weight, updates = self.parts(name)
        return effective_weight(weight, updates) if updates and not is_shard(weight) else weight

    def select(self, adapters: tuple[str, ...]) -> None:
        """Use these adapters, of those that the layer has."""
        self.lora_active = adapters
        self._resolve()

    def _resolve(self) -> None:
        """Compute what the adapters in use, and their being merged, come to."""
        lora = cast("Mapping[str, Mapping[str, LowRankUpdate]]", self.lora)
        used = [(a, key, lora[a][key].slot) for a in self.lora_active for key in lora[a]]
        whole = [(adapter, key) for adapter, key, slot in used if slot.out_range is None]
        self.lora_alone = whole[0] if len(whole) == len(used) == 1 and not self.lora_merged else None
        self.lora_used = {slot.parameter: () for _, _, slot in used}
        for adapter, key, slot in used:
            self.lora_used[slot.parameter] += ((adapter, key),)

    def alone(self) -> LowRankUpdate | None:
        """The one update to be added, as the calling thread or task sees the layer; None where `parts` is to
        be asked."""
        if self.lora_alone is None or self.lora_choice.viewed:
            return None
        adapter, key = self.lora_alone
        lora: Any = self._modules["lora"]
        update: LowRankUpdate = lora._modules[adapter]._modules[key]
        return update

    @property
    def together(self) -> Together:
        """What forms merged weights with those of the model's other layers."""
        return self.lora_choice.together

    def factored(self) -> tuple[Factors, float] | None:
        """W and the one update to be added to it, where it can be merged with others' for the products of a
        step; and its scaling."""
        update, weight = self.alone(), self._parameters.get("weight")
        if update is None or weight is None or weight.requires_grad or update.makes_factors:
            return None  # factors that are joined are others at each call, and would wait in vain
        return Factored(weight, update.lora_A, update.lora_B, update.lora_magnitude), update.scaling

    def parts(self, name: str) -> tuple[Tensor, list[LowRankUpdate]]:
        """W and the updates to be added to it, as the calling thread or task sees the layer. Merged ones are
        in W already, but for a view, which has adapters of its own."""
        view = self.lora_choice.view()
        if view is None:
            if self.lora_merged:
                return self._merged(name), []
            lora: Any = self._modules["lora"]
            used = self.lora_used.get(name, ())
            return self._weight(name), [lora._modules[a]._modules[key] for a, key in used]
        view.refuse_reading(self.lora_path)
        return self._seen(view, name), self._updates_of(view.active, name)

    def base_weight(self, name: str) -> Tensor:
        """W: the parameter, or what the module's own parametrization makes of it; after
        `merge_updates` a parameter holds the merged values."""
        view = self.lora_choice.view()
        return self._weight(name) if view is None else self._seen(view, name)

    def _weight(self, name: str) -> Tensor:
        weight = self._parameters.get(name)
        if weight is None:  # under FSDP, between its states, or computed by the module's parametrization
            weight = self.__dict__.get(name)
        return getattr(self.original_class, name).fget(self) if weight is None else weight

    def _merged(self, name: str) -> Tensor:
        merged = self._buffers.get(f"lora_merged_{name}")
        return self._weight(name) if merged is None else merged

    def _seen(self, view: View, name: str) -> Tensor:
        """W in a view: unmerged; another adapter may train it in full."""
        path = f"{self.lora_path}.{name}" if self.lora_path else name
        if path in view.values:
            return cast(Tensor, view.value(path))
        original = self._buffers.get(f"lora_unmerged_{name}")
        return self._weight(name) if original is None else original

    def _updates_of(self, adapters: tuple[str, ...], name: str) -> list[LowRankUpdate]:
        """Those of these adapters that belong to the parameter `name`."""
        here = (u for adapter in adapters if adapter in self.lora for u in self.updates(adapter))
        return [u for u in here if u.slot.parameter == name]

    def reset_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Begin anew, as when a model on the meta device is given memory: the base weights by the
        module's own method, if it has one, then the updates."""
        self._reset("reset_parameters", *args, **kwargs)

    def _reset_parameters(self, *args: Any, **kwargs: Any) -> None:
        """The same, under the name that it has in nn.MultiheadAttention."""
        self._reset("_reset_parameters", *args, **kwargs)

    def _reset(self, method: str, *args: Any, **kwargs: Any) -> None:
        active = self.lora_active
        self.select(())  # so that it meets the base weights
        try:
            if hasattr(self.original_class, method):
                getattr(self.original_class, method)(self, *args, **kwargs)
        finally:
            self.select(active)
        for update in (u for adapter in self.lora for u in self.updates(adapter)):
            update.reset_parameters()
            update.reset_magnitude(update.slot.of(self.base_weight(update.slot.parameter)))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What assigning a parameter does: one of another shape does not fit the updates.

        Raises:
            UserError: it has another shape; nothing is changed.
        """
        present = self._parameters.get(name)
        if name in self.properties and param is not None and present is not None:
            changed = param.dim() == present.dim() and param.shape != present.shape
            if changed and not (is_shard(param) or is_shard(present)):
                raise UserError(resized(self, name, tuple(present.shape), tuple(param.shape)))
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """An empty tensor stands for a frozen weight that a checkpoint leaves out."""
        for name in self.properties:
            if isinstance(stored := state.get(prefix + name), Tensor) and not stored.numel():
                del state[prefix + name]
        super()._load_from_state_dict(state, prefix, *rest)

    def updates(self, adapter: str) -> list[LowRankUpdate]:
        """The updates that make up one adapter."""
        return list(cast(nn.ModuleDict, self.lora[adapter]).values())  # type: ignore[arg-type]  # updates all

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """The effective weights by name, in their own dtype, the sum taken in float32 or better.

        Raises:
            UserError: an update is not finite.
        """
        merged = self.present_weights()
        for name, weight in merged.items():
            if not torch.isfinite(weight).all() and torch.isfinite(self.base_weight(name)).all():
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
            if name not in places:  # what a view of the base reads
                self.register_buffer(f"lora_unmerged_{name}", self._weight(name).detach(), persistent=False)
            for place, value in places.items():
                module, leaf = self._place(place)
                original = cast(nn.Parameter, module._parameters[leaf])
                # as a buffer the base weight follows the module to another device
                module.register_buffer(f"lora_unmerged_{leaf}", original.data, persistent=False)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                self.lora_originals[place] = original
        self.lora_merged = True
        self._resolve()
        return hidden

    def unmerge_updates(self) -> None:
        """Put the base weights back, bit for bit."""
        self.lora_merged = False
        self._resolve()
        for name in self.properties:
            if name not in self.lora_originals and f"lora_unmerged_{name}" in self._buffers:
                delattr(self, f"lora_unmerged_{name}")
        for place, original in self.lora_originals.items():
            if original is None:
                delattr(self, f"lora_merged_{place}")
                continue
            module, leaf = self._place(place)
            original.data = kept = cast(Tensor, module._buffers[f"lora_unmerged_{leaf}"])
            if isinstance(original, QuantizedTensor):  # `data` is no more than the outside of one
                original.codes, original.scales = kept.codes, kept.scales  # type: ignore[attr-defined]  # one too
            delattr(module, f"lora_unmerged_{leaf}")
            module._parameters[leaf] = original
        self.lora_originals.clear()

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module, this one or a part of it, and the leaf that such a name of a parameter means."""
        path, _, leaf = name.rpartition(".")
        return self.get_submodule(path), leaf


def adapt(
    module: nn.Module,
    family: type[LoRALayer],
    slots: dict[str, LowRankUpdate],
    adapter: str,
    choice: Choice,
    path: str,
) -> None:
    """Give `module` an adapter, which is not active yet; a plain module becomes a layer of `family`.

    Args:
        slots: the adapter's updates by slot name.
        choice: of the model.
        path: the module's name in the model.
    """
    parameters = {update.slot.parameter for update in slots.values()}
    if not isinstance(module, LoRALayer):
        swap_class(module, family)
        module.lora = nn.ModuleDict().train(module.training)
        fresh: dict[str, object] = {
            "lora_active": (),
            "lora_alone": None,
            "lora_used": {},
            "lora_merged": False,
            "lora_norm": None,
        }
        module.__dict__.update(fresh, lora_originals={}, lora_choice=choice, lora_path=path)
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
    for name in OWN:
        del layer.__dict__[name]
    del layer._modules["lora"]
    _refresh(layer)


def _compute(layer: LoRALayer, parameters: set[str]) -> None:
    """Give the layer the class that computes these parameters, which some adapter updates."""
    names = tuple(sorted(parameters))
    give_class(layer, swapped_class(layer.mixin_class, layer.original_class, names))
    _refresh(layer)


def _refresh(layer: nn.Module) -> None:
    """A recurrent module keeps a list of its weights, as they were when it made it."""
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def slot_key(slot: str) -> str:
    """A slot's name as a key of `lora[adapter]`: "" is `weight`, `in_proj.q` is `in_proj_q`."""
    return slot.replace(".", "_") or "weight"
