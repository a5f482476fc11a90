"""What names a base model: short digests of its frozen tensors, cheap enough to take at every save."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.state import is_injected, state_of
from lora_lightning.layers.norm import has_statistics
from lora_lightning.layers.registry import lora_layers
from lora_lightning.utils.digests import PART, digests, same
from lora_lightning.utils.names import joined, named_modules, named_parameters, own_buffers, submodule
from lora_lightning.utils.sharding import is_flattened
from lora_lightning.utils.tables import truncate_list


def fingerprint_of(model: nn.Module) -> dict[str, str]:
    """Digests of the frozen tensors by name: parameters that no adapter trains, and the running
    statistics of frozen norms. Tensors without memory (meta device) are left out.

    The same before and after injection, merging and moving to another device. A digest covers the shape
    and up to 1,024 values spread over the tensor, three times: as float32, rounded to bfloat16 and to
    float16. Two tensors count as the same when one of the three agrees, so that a model cast to half
    precision is still the same base.

    Args:
        model: adapted or not; of a plain one every parameter counts. Where FSDP2 has sharded it, every
            process must call this; where FSDP has flattened it, nothing is known.
    """
    if is_flattened(model):
        return {}
    return digests(frozen_tensors(model))


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base tensors that no adapter trains, with the values that they have unmerged."""
    layers = lora_layers(model)
    ours = {id(p) for layer in layers.values() for p in layer.lora.parameters()}
    merged = {
        joined(n, name): original
        for n, layer in layers.items()
        for name, original in layer.lora_originals.items()
        if original is not None
    }
    tensors: dict[str, Tensor] = {n: p for n, p in named_parameters(model).items() if id(p) not in ours}
    # A merged parameter stands in the place of the original, whose values a buffer holds.
    tensors.update({n: _unmerged(model, n) for n in merged})
    for name, module in named_modules(model).items():
        if has_statistics(module):
            tensors.update(own_buffers(name, module))
    trained: set[str] = set()
    if is_injected(model):
        trained = {n for n, p in named_parameters(model).items() if p.requires_grad}
        trained |= state_of(model).originals.keys()
    return {n: t.detach() for n, t in tensors.items() if n not in trained}


def other_tensors(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The tensors in both that differ."""
    return [n for n in saved if n in here and not same(saved[n], here[n])]


def refusal_of_base(saved: Mapping[str, str], here: Mapping[str, str], what: str) -> str | None:
    """Why `what`, made on the base `saved`, is not for the base `here`; None when it is."""
    others = other_tensors(saved, here)
    if not others:
        return None
    common = len(saved.keys() & here.keys())
    return (
        f"{what} was trained on another base model: {len(others)} of {common} frozen tensors differ "
        f"({truncate_list(others, most=3)}). Give the model the weights that it was trained on; with "
        f"check_base=False it is loaded all the same."
    )


def short(saved: Mapping[str, str]) -> str:
    """Eight hexadecimal digits for a whole base, to be read by people; the names do not count, since a
    LightningModule puts its own before them."""
    return sha256("".join(sorted(saved.values())).encode()).hexdigest()[:8]


def is_fingerprint(value: Any) -> bool:
    """Whether a value read from a file has the form of one."""
    return isinstance(value, dict) and all(
        isinstance(n, str) and isinstance(d, str) and len(d) == 3 * PART for n, d in value.items()
    )


def _unmerged(model: nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    return submodule(model, module).get_buffer(f"lora_unmerged_{leaf}")
