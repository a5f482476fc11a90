"""Names of modules and tensors without the wrappers of torch.compile, DDP, FSDP and activation checkpointing.

A wrapper holds one module and adds a word to the names below it: `model._orig_mod.0.weight`. Plans, files,
checkpoints and fingerprints know `model.0.weight` alone, so that they fit the model wrapped and not. What is
a wrapper is told by its class, never by the word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

T = TypeVar("T")

# Module and class of a wrapper -> the child that it wraps; and whether it hides that name in `state_dict()`.
WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): ("_orig_mod", False),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): ("module", False),
    ("torch.nn.parallel.data_parallel", "DataParallel"): ("module", False),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): (
        "_fsdp_wrapped_module",
        True,
    ),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): (
        "_checkpoint_wrapped_module",
        True,
    ),
}

_known_wrappers: WeakKeyDictionary[type, tuple[str, bool] | None] = WeakKeyDictionary()


def by_class(module: nn.Module, table: Mapping[tuple[str, str], T]) -> T | None:
    """What a table has for the first class, by its module and its name, of which this is an instance; None
    for others. Nothing is imported: a class that is not has no instances."""
    for (path, name), about in table.items():
        cls = getattr(sys.modules.get(path), name, None)
        if cls is not None and isinstance(module, cls):
            return about
    return None


def _wrapped(module: nn.Module) -> tuple[str, bool] | None:
    """Name of the child that a wrapper wraps, and whether `state_dict()` is without it; None for others."""
    cls = type(module)
    if cls not in _known_wrappers:  # a class is none for good: its bases stand when it is made
        _known_wrappers[cls] = by_class(module, WRAPPERS)
    return _known_wrappers[cls]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module in its wrappers, or the module itself."""
    while (about := _wrapped(module)) is not None:
        module = cast(nn.Module, module._modules[about[0]])
    return module


def joined(module: str, leaf: str) -> str:
    """The name of something in a module; "" is the model itself."""
    return f"{module}.{leaf}" if module and leaf else module or leaf


def inside(name: str, parents: Iterable[str]) -> bool:
    """Whether `name` is one of `parents` or lies below one."""
    return any(name == p or name.startswith(f"{p}.") for p in parents)


def family(name: str) -> str:
    """A name with `*` for the numbers of blocks and stages, which all that repeats has in common."""
    return re.sub(r"\d+\.", "*.", name)


def own_buffers(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a module of this name itself has, such as a norm's running statistics."""
    return {joined(name, leaf): buffer for leaf, buffer in module.named_buffers(recurse=False)}


def named_modules(model: nn.Module, all_names: bool = False) -> dict[str, nn.Module]:
    """As `model.named_modules()`, in its order and without wrappers; with `all_names` a shared module by each
    of its names."""
    return dict(_walk(model, "", None if all_names else set()))


def _walk(module: nn.Module, name: str, seen: set[nn.Module] | None) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, joined(name, key), seen)


def named_children(module: nn.Module) -> dict[str, nn.Module]:
    """As `module.named_children()`, without wrappers."""
    return {n: unwrapped(child) for n, child in unwrapped(module).named_children()}


def named_parameters(model: nn.Module, all_names: bool = False) -> dict[str, nn.Parameter]:
    """As `model.named_parameters()`, without wrappers in the names; with `all_names` a tied parameter by each
    of its names."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in named_modules(model, all_names).items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and (all_names or id(parameter) not in seen):
                seen.add(id(parameter))
                found[joined(name, leaf)] = parameter
    return found


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """As `model.named_buffers()`, without wrappers in the names."""
    return {
        joined(name, leaf): buffer
        for name, module in named_modules(model).items()
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    }


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of this name in `named_modules(model, all_names=True)`.

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(module.get_submodule(part))
    return module


def plain_name(model: nn.Module, name: str) -> str:
    """A name in `model.state_dict()`, or in what torch says of it, without the words of wrappers."""
    return _renamed(model, name, stored=False)


def stored_name(model: nn.Module, name: str) -> str:
    """The inverse of `plain_name`: the name that `model.state_dict()` has."""
    return _renamed(model, name, stored=True)


def _renamed(model: nn.Module, name: str, stored: bool) -> str:
    module: nn.Module | None = model
    made: list[str] = []
    for part in name.split("."):
        while module is not None and (about := _wrapped(module)) is not None:
            word, hidden = about
            module = module._modules[word]
            if stored and not hidden:
                made.append(word)
            elif not stored and part == word:
                break
        else:
            made.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(made)


def without_hidden(prefix: str) -> str:
    """What stands before a model's names in `state_dict()`, without the words that wrappers around the model
    hide there; those are not to be seen from within."""
    words = [word for word, hidden in WRAPPERS.values() if hidden]
    return "".join(f"{part}." for part in prefix.split(".")[:-1] if part not in words)


def is_wrapping(model: nn.Module) -> bool:
    """Whether a name in `model.state_dict()` can have the word of a wrapper."""
    return any((about := _wrapped(m)) is not None and not about[1] for m in model.modules())
