"""In-place change of a module's class: the same object, now of a subclass of its own class."""

from __future__ import annotations

from typing import Any

from torch import nn


class Swapped(nn.Module):
    """Mixin of every class made here: knows its parts, so that objects pickle and copy.

    Attributes:
        prefix: what the made class's name begins with: `LoRA` over nn.Linear is `LoRALinear`.
    """

    prefix: str
    mixin_class: type[Swapped]
    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that a pickle must name its parts instead.
        parts: Any = super().__reduce_ex__(protocol)
        return _rebuild, (self.mixin_class, self.original_class), *parts[2:]


_made: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}


def swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` that behaves as `mixin`; one class for each pair."""
    if (mixin, original) not in _made:
        body = {
            "__module__": mixin.__module__,
            "__doc__": mixin.__doc__,
            "mixin_class": mixin,
            "original_class": original,
        }
        _made[mixin, original] = type(f"{mixin.prefix}{original.__name__}", (mixin, original), body)
    return _made[mixin, original]


def swap_in(module: nn.Module, mixin: type[Swapped]) -> None:
    """Give `module` the behaviour of `mixin`; its identity, parameters, hooks and `isinstance` stay."""
    module.__class__ = swapped_class(mixin, type(module))


def swap_out(module: nn.Module) -> None:
    """Give `module` its original class back."""
    assert isinstance(module, Swapped)
    module.__class__ = module.original_class  # type: ignore[assignment]


def _rebuild(mixin: type[Swapped], original: type[nn.Module]) -> nn.Module:
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)
