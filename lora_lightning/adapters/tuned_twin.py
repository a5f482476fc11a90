"""A fine-tuned twin of a base: copies of its modules that hold the tensors of a state dict themselves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, did_you_mean
from lora_lightning.utils.copying import copied
from lora_lightning.utils.names import (
    inside,
    is_wrapping,
    joined,
    named_buffers,
    named_parameters,
    stored_name,
    submodule,
    unwrapped,
)
from lora_lightning.utils.tables import truncate_list
from lora_lightning.utils.torch_file import torch_reasons

COUNTS = "num_batches_tracked"  # which older files do not have
WRAPPER = "_orig_mod."  # torch.compile's, in the names of a state dict
SIZES = ("out_features", "out_channels", "num_embeddings")  # attributes of the first dimension


@dataclass(frozen=True)
class Twin:
    """What the base becomes by fine-tuning.

    Attributes:
        model: it shares with the base what the state dict does not have.
        resized: heads' tensors of another number of classes, by name: their shape in the base.
        foreign: tensors of the state dict beside the network.
    """

    model: nn.Module
    resized: dict[str, tuple[int, ...]]
    foreign: list[str]


def tuned_twin(base: nn.Module, state: Mapping[str, Tensor], heads: Iterable[str], where: str) -> Twin:
    """The base with the tensors of a state dict, whose names may have words more or less before them, as
    those of a LightningModule, of DDP and of torch.compile do.

    Args:
        base: it is not changed.
        heads: names of the modules that may have another number of outputs.
        where: the state dict, for errors.

    Raises:
        AdapterFileError: tensors are missing, foreign or of another shape, with near misses.
    """
    base = unwrapped(base)
    own: dict[str, Tensor] = {**named_parameters(base, all_names=True), **named_buffers(base)}
    given, foreign = _renamed(state, {_plain(n) for n in base.state_dict()})
    for name, tensor in own.items():  # of tied ones a file may hold one alone
        same = (n for n, other in own.items() if other is tensor and n in given)
        if name not in given and (tied := next(same, None)) is not None:
            given[name] = given[tied]
    kept = [*own.values(), *(t for m in base.modules() for t in getattr(m, "_flat_weights", ()))]
    twin = copied(base, {id(tensor): tensor for tensor in kept if tensor is not None})
    shapes = {n: own[n].shape for n, t in given.items() if n in own and own[n].shape != t.shape}
    resized = {n: tuple(s) for n, s in shapes.items() if inside(n, heads) and _fits(own[n], given[n])}
    problems = [
        f"{n} is {tuple(given[n].shape)}, in the base {tuple(shape)}"
        for n, shape in shapes.items()
        if n not in resized
    ]
    for name in resized:
        resize(twin, name, tuple(given[name].shape))
    missing, unexpected = _assigned(
        twin, {n: t for n, t in given.items() if n not in shapes or n in resized}, problems
    )
    missing = [n for n in missing if n not in shapes and not n.endswith(COUNTS)]
    near = did_you_mean(unexpected[0], missing) if unexpected and missing else ""
    problems += [f"it lacks {truncate_list(missing)}"] if missing else []
    problems += [f"the base has no {truncate_list(unexpected)}{near}"] if unexpected else []
    if problems:
        raise AdapterFileError(
            f"{where} is not a fine-tuned {type(base).__name__} as base is one; nothing was changed:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nGive the model that it was tuned from, with the same layers in it."
        )
    return Twin(twin, resized, foreign)


def resize(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a parameter of the model another number of rows, all of them zero: a fresh head."""
    path, _, leaf = name.rpartition(".")
    module = submodule(model, path)
    present = module._parameters[leaf]
    assert present is not None
    module._parameters[leaf] = nn.Parameter(present.new_zeros(shape), present.requires_grad)
    for size in SIZES:
        if getattr(module, size, None) == present.shape[0]:
            setattr(module, size, shape[0])


def _fits(own: Tensor, given: Tensor) -> bool:
    """Whether they differ in the number of rows alone."""
    return own.dim() == given.dim() > 0 and own.shape[1:] == given.shape[1:]


def _plain(name: str) -> str:
    return name.replace(WRAPPER, "")


def _renamed(state: Mapping[str, Tensor], names: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of the base, by taking away or putting before them what gives the most
    names that the base has; and where something is taken away, the tensors without it."""
    state = {_plain(n): t for n, t in state.items()}
    starts = {".".join(n.split(".")[:i]) for n in state for i in (1, 2) if n.count(".") >= i}
    shorter = {
        start: {n.removeprefix(f"{start}."): n for n in state if inside(n, [start])} for start in starts
    }
    longer = {joined(top, ""): {joined(top, n): n for n in state} for top in {n.split(".")[0] for n in names}}
    plain = {n: n for n in state}
    best = max([plain, *shorter.values(), *longer.values()], key=lambda renamed: len(renamed.keys() & names))
    taken = set(best.values())
    return {new: state[n] for new, n in best.items()}, [n for n in state if n not in taken]


def _assigned(
    twin: nn.Module, given: Mapping[str, Tensor], problems: list[str]
) -> tuple[list[str], list[str]]:
    """Put the tensors themselves into the twin; names that are missing and foreign."""
    wrapped = is_wrapping(twin)
    state = OrderedDict((stored_name(twin, n) if wrapped else n, t) for n, t in given.items())
    vars(state)["_metadata"] = getattr(
        twin.state_dict(), "_metadata", {}
    )  # versions, which files do not have
    try:
        found = twin.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # of a name that a layer's class has renamed
        problems += torch_reasons(error)
        return [], []
    return [_plain(n) for n in found.missing_keys], [_plain(n) for n in found.unexpected_keys]
