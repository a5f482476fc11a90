"""The optimizers by name: whose class each is, and what it is called with. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lora_lightning.utils.libraries import EXTRAS, loading

ADAM, SGD = ("betas", "eps"), ("momentum", "nesterov")


@dataclass(frozen=True)
class Kind:
    """An optimizer: a class of torch's, of ours, of timm's or of bitsandbytes'.

    Attributes:
        target: its dotted name.
        takes: options of OptimConfig beyond rates and decay.
        given: what it is called with where an option is None, or always.
        fused: whether one kernel can update all parameters.
        for_updates: whether it is called with the module whose updates it knows by their factors.
    """

    target: str
    takes: tuple[str, ...] = ADAM
    given: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    for_updates: bool = False

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]


KINDS: dict[str, Kind] = {
    "adamw": Kind("torch.optim.AdamW", fused=True),
    "adam": Kind("torch.optim.Adam", fused=True),
    "sgd": Kind("torch.optim.SGD", SGD, {"momentum": 0.9}, fused=True),
    "scaled_adamw": Kind(
        "lora_lightning.methods.scaled_adamw.ScaledAdamW", (*ADAM, "damping"), for_updates=True
    ),
    "lion": Kind("timm.optim.Lion", ("betas",)),
    "lamb": Kind("timm.optim.Lamb"),
    "adafactor": Kind("timm.optim.Adafactor", ()),
    "muon": Kind("timm.optim.Muon", (*SGD, "betas", "eps"), {"nesterov": True}),
    "adamw8bit": Kind("bitsandbytes.optim.AdamW8bit"),
    "paged_adamw8bit": Kind("bitsandbytes.optim.PagedAdamW8bit"),
    "sgd8bit": Kind("bitsandbytes.optim.SGD8bit", SGD, {"momentum": 0.9}),
    "lion8bit": Kind("bitsandbytes.optim.Lion8bit", ("betas",)),
}
OPTIONS = tuple(dict.fromkeys(option for kind in KINDS.values() for option in kind.takes))
PACKAGES = {**EXTRAS, "bitsandbytes": "nf4"}  # the extra that brings each library


def missing_library(name: str) -> str | None:
    """What to install for the optimizer of this name, None where it is there. Nothing is imported."""
    library = KINDS[name].library
    if find_spec(library) is not None:
        return None
    return f"needs {library}, which is not installed: pip install 'lora-lightning[{PACKAGES[library]}]'"


def class_of(name: str) -> Any:
    """The optimizer's class.

    Raises:
        LibraryError: its library is missing, does not load, or is too old to have it.
    """
    kind = KINDS[name]
    module, _, cls = kind.target.rpartition(".")
    with loading(kind.library, PACKAGES.get(kind.library)):
        return getattr(import_module(module), cls)


def options_for(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer's class is called with beyond its groups and their rates: what is not None."""
    chosen = {option: given[option] for option in KINDS[name].takes if given[option] is not None}
    return {**KINDS[name].given, **chosen}


def untaken(name: str, given: Mapping[str, Any]) -> Iterable[str]:
    """The options given that this optimizer does not take."""
    return (o for o in OPTIONS if given.get(o) is not None and o not in KINDS[name].takes)
