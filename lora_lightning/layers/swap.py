"""In-place change of a module's class: the same object, now of a subclass of its own class."""

from __future__ import annotations

from typing import Any

from torch import nn


class Swapped(nn.Module):
    """Mixin of every class made here: knows its parts, so that objects pickle and copy.

    Attributes:
        prefix: what the made class's name begins with: `LoRA` over nn.Linear is `LoRALinear`.
        properties: names of the parameters that the made class computes by `read`.
    """

    prefix: str
    mixin_class: type[Swapped]
    original_class: type[nn.Module]
    properties: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that a pickle must name its parts instead.
        parts: Any = super().__reduce_ex__(protocol)
        return _rebuild, (self.mixin_class, self.original_class, self.properties), *parts[2:]

    def read(self, name: str) -> Any:
        """The value of the property `name`."""
        raise NotImplementedError


_made: dict[tuple[type[Swapped], type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def swapped_class(
    mixin: type[Swapped], original: type[nn.Module], properties: tuple[str, ...] = ()
) -> type[nn.Module]:
    """The subclass of `original` that behaves as `mixin`; one class for each combination."""
    key = (mixin, original, properties)
    if key not in _made:
        body = {
            "__module__": mixin.__module__,
            "__doc__": mixin.__doc__,
            "mixin_class": mixin,
            "original_class": original,
            "properties": properties,
            **{name: _property(name) for name in properties},
        }
        _made[key] = type(f"{mixin.prefix}{original.__name__}", (mixin, original), body)
    return _made[key]


def swap_in(module: nn.Module, mixin: type[Swapped], properties: tuple[str, ...] = ()) -> None:
    """Give `module` the behaviour of `mixin`; its identity, parameters, hooks and `isinstance` stay."""
    module.__class__ = swapped_class(mixin, type(module), properties)


def swap_out(module: nn.Module) -> None:
    """Give `module` its original class back."""
    assert isinstance(module, Swapped)
    module.__class__ = module.original_class  # type: ignore[assignment]


def _property(name: str) -> property:
    """Reads by `read`; FSDP puts plain tensors in the place of parameters, which go to `__dict__`."""

    def put(self: Swapped, value: Any) -> None:
        self.__dict__[name] = value

    def remove(self: Swapped) -> None:
        if self.__dict__.pop(name, None) is None:
            raise AttributeError(name)

    return property(lambda self: self.read(name), put, remove)


def _rebuild(mixin: type[Swapped], original: type[nn.Module], properties: tuple[str, ...]) -> nn.Module:
    cls = swapped_class(mixin, original, properties)
    return cls.__new__(cls)
