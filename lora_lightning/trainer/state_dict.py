"""What a Trainer's checkpoint holds of an adapted model: hooks on its state_dict, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.state import ADVICE, is_injected, state_of
from lora_lightning.errors import AdapterFileError
from lora_lightning.layers.registry import update_ids
from lora_lightning.planning.targets import inside_backbone
from lora_lightning.utils.names import (
    is_wrapping,
    named_parameters,
    own_buffers,
    plain_name,
    stored_name,
    submodule,
    without_hidden,
)
from lora_lightning.utils.sharding import is_flattened, is_sharded


def keep_trained_only(model: nn.Module, full: bool = False) -> None:
    """From now on `model.state_dict()` leaves out what is frozen (unless `full`), and `load_state_dict()`
    forgives its absence, and that alone; the names in both are those of `names.named_modules`, whatever
    wraps a module. The submodules' own `state_dict()` are as ever.

    Hooks on the module serve every way of saving: Lightning does not call the callbacks' hooks with
    `save_weights_only=True`. They do nothing once the model is ejected.
    """
    model.__dict__["lora_full_state_dict"] = full
    if _drop_frozen not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_drop_frozen)
        model.register_load_state_dict_pre_hook(_refuse_misfit)
        model.register_load_state_dict_post_hook(_forgive_frozen)


def keep_trained_only_of(wrapper: nn.Module, model: nn.Module) -> None:
    """The same for `wrapper.state_dict()`, where FSDP has wrapped the model: FSDP needs every parameter in
    the model's own `state_dict()`, to gather it."""

    def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        if is_injected(model):
            for name in frozen_names(model):
                state.pop(prefix + name, None)

    if not model.__dict__["lora_full_state_dict"]:
        wrapper.register_state_dict_post_hook(drop_frozen)


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the frozen parameters of the backbone, and of the buffers of the norm layers that are frozen
    with it; the updates of adapters that are not selected are none of them."""
    state, updates = state_of(model), update_ids(model)
    frozen = {
        n
        for n, p in named_parameters(model, all_names=True).items()
        if not p.requires_grad and id(p) not in updates and inside_backbone(n, state.plan.backbone)
    }
    for name in state.training:
        frozen |= own_buffers(name, submodule(model, name)).keys()
    return frozen


def _drop_frozen(model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if is_injected(model) and not is_flattened(model):
        if is_wrapping(model):
            for names in (state, getattr(state, "_metadata", {})):  # the second has the modules' versions
                _rename(names, prefix, lambda name: plain_name(model, name))
        for name in () if model.__dict__["lora_full_state_dict"] else frozen_names(model):
            state.pop(prefix + name, None)


def _rename(names: dict[str, Any], prefix: str, rename: Callable[[str], str]) -> None:
    """Change the names below the prefix, in their order."""
    renamed = {
        prefix + rename(n.removeprefix(prefix)) if n.startswith(prefix) else n: value
        for n, value in names.items()
    }
    names.clear()
    names.update(renamed)


def _refuse_misfit(
    model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """`refuse_misfit`, when the model is loaded as a whole; FSDP2 comes with one tensor at a time."""
    model.__dict__["lora_load_prefix"] = prefix
    state.pop(prefix + ADVICE, None)
    if is_injected(model) and (is_flattened(model) or not is_sharded(model)):
        refuse_misfit(model, state, prefix)
        if is_wrapping(model):
            _rename(state, prefix, lambda name: stored_name(model, name))


def refuse_misfit(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """A checkpoint without the model's updates, or with updates of another rank, is an error whether
    loading is strict, which torch does not tell its hooks, or not.

    Raises:
        AdapterFileError: it is such a checkpoint.
    """
    updates = update_ids(model)
    named = named_parameters(model, all_names=True)
    expected = {prefix + n: p for n, p in named.items() if id(p) in updates}
    absent = [n for n in expected if n not in state]
    if absent:
        raise AdapterFileError(
            f"the checkpoint lacks {len(absent)} of the model's {len(expected)} LoRA tensors, first "
            f"{absent[0]}. Was it saved without LoRACallback, or with other targets? Configure LoRA as "
            f"it was when the checkpoint was saved; load weights of the base before the fit, or into the "
            "network in the module with strict=False."
        )
    for name, parameter in expected.items():
        stored = state.get(name)
        if isinstance(stored, Tensor) and stored.shape != parameter.shape:
            raise AdapterFileError(
                f"the checkpoint does not fit: {name} is {tuple(stored.shape)} in it and "
                f"{tuple(parameter.shape)} in the model. Give LoRA the rank that it had when the "
                f"checkpoint was saved."
            )


def _forgive_frozen(model: nn.Module, incompatible: Any) -> None:
    if is_injected(model):
        frozen, prefix = frozen_names(model), model.__dict__["lora_load_prefix"]
        prefixes = (prefix, without_hidden(prefix))  # FSDP around the model takes its own word out
        missing = incompatible.missing_keys
        missing[:] = [
            n
            for n in missing
            if not any(n.startswith(p) and plain_name(model, n.removeprefix(p)) in frozen for p in prefixes)
        ]
