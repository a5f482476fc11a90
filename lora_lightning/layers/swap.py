"""In-place change of a module's class: the same object, now of a subclass of its own class."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

GET_PARAMETER = nn.Module.get_parameter.__code__


class ClassSwap(nn.Module):
    """Mixin of every class made here: knows its parts, so that objects pickle and copy.

    Attributes:
        prefix: what the made class's name begins with: `LoRA` over nn.Linear is `LoRALinear`.
        properties: names of the parameters that the made class computes by `read`.
        keeps_state: whether the module's attributes that begin with `lora_` are its own for good.
    """

    prefix: str
    keeps_state = False
    mixin_class: type[ClassSwap]
    original_class: type[nn.Module]
    properties: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that a pickle must name its parts instead.
        parts: Any = super().__reduce_ex__(protocol)
        return _rebuild, (self.mixin_class, self.original_class, self.properties), *parts[2:]

    def read(self, name: str) -> Any:
        """The value of the property `name`."""
        raise NotImplementedError


MADE = "_lora_made"  # attribute of a class: those made of it, which so live as long as it does


def swapped_class(
    mixin: type[ClassSwap], original: type[nn.Module], properties: tuple[str, ...] = ()
) -> type[nn.Module]:
    """The subclass of `original` that behaves as `mixin`; one class for each combination."""
    body = {
        "__module__": mixin.__module__,
        "__doc__": mixin.__doc__,
        "mixin_class": mixin,
        "original_class": original,
        "properties": properties,
        **{name: _property(name) for name in properties},
    }
    return made_class((mixin, properties), f"{mixin.prefix}{original.__name__}", (mixin, original), body)


def made_class(
    key: tuple[Any, ...], name: str, bases: tuple[type, type], body: dict[str, Any]
) -> type[nn.Module]:
    """The subclass of the last of `bases` that this key means, made when there is none.

    It is kept: a class that were freed while another thread is within one of its methods would crash it.
    """
    if MADE not in bases[-1].__dict__:
        setattr(bases[-1], MADE, {})
    classes: dict[tuple[Any, ...], type[nn.Module]] = bases[-1].__dict__[MADE]
    return classes.get(key) or classes.setdefault(key, type(name, bases, body))


class Viewed(nn.Module):
    """Mixin of a class on top of a module's own while some thread or task sees the module otherwise.

    Attributes:
        beneath: the module's class.
    """

    beneath: type[nn.Module]

    @classmethod
    def on_top_of(cls, beneath: type[nn.Module]) -> type[nn.Module]:
        """The same on top of another class."""
        raise NotImplementedError


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what lies on top while some thread sees it otherwise."""
    return module.beneath if isinstance(module, Viewed) else type(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before anything here changed it."""
    cls = class_of(module)
    while issubclass(cls, ClassSwap):
        cls = cls.original_class
    return cls


def give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class beneath what lies on top."""
    module.__class__ = module.on_top_of(cls) if isinstance(module, Viewed) else cls


def swap_class(module: nn.Module, mixin: type[ClassSwap], properties: tuple[str, ...] = ()) -> None:
    """Give `module` the behaviour of `mixin`; its identity, parameters, hooks and `isinstance` stay."""
    give_class(module, swapped_class(mixin, class_of(module), properties))


def swap_out(module: nn.Module) -> None:
    """Give `module` its original class back."""
    assert isinstance(module, ClassSwap)
    give_class(module, module.original_class)


def _property(name: str) -> property:
    """Reads by `read`; FSDP puts plain tensors in the place of parameters, which go to `__dict__`.

    `nn.Module.get_parameter` reads the attribute and asks for a parameter: it gets the one that has this name
    in `named_parameters()`, the base weight.
    """

    def get(self: ClassSwap) -> Any:
        asked = not torch.compiler.is_compiling() and sys._getframe(1).f_code is GET_PARAMETER
        return self._parameters[name] if asked and name in self._parameters else self.read(name)

    def put(self: ClassSwap, value: Any) -> None:
        self.__dict__[name] = value

    def remove(self: ClassSwap) -> None:
        if self.__dict__.pop(name, None) is None:
            raise AttributeError(name)

    return property(get, put, remove)


def _rebuild(mixin: type[ClassSwap], original: type[nn.Module], properties: tuple[str, ...]) -> nn.Module:
    cls = swapped_class(mixin, original, properties)
    return cls.__new__(cls)
