"""method=peft: Hugging Face PEFT's LoRA on the layers of our plan, trained by the same Trainer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from lora_lightning.adapters.eject import eject
from lora_lightning.adapters.inject import inject
from lora_lightning.adapters.manage import lora_parameters
from lora_lightning.adapters.state import state_of, viewed_as_plain
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.files.alignment import network_of
from lora_lightning.files.from_model import saved_adapter
from lora_lightning.files.origin import Origin
from lora_lightning.files.pair import peft_metadata, write_pair
from lora_lightning.files.peft_write import OURS, to_peft
from lora_lightning.layers.factors import INITS
from lora_lightning.layers.norm import FrozenNorm, freeze_statistics, has_statistics
from lora_lightning.planning.plan import Plan
from lora_lightning.utils.copying import holding
from lora_lightning.utils.names import joined, named_modules, named_parameters, own_buffers, submodule

NOT_PEFTS = ("peft_type", "peft_version", "auto_mapping", "inference_mode")  # of what stands in its file
COPY, BASE, UNUSED = ".modules_to_save.default", ".base_layer", ".original_module"


class PeftLoRA:
    """The network of a task in PEFT's hands: the layers, ranks, scaling and dropout of our plan, and what it
    trains beside. The network stays the same object, so that the task goes on as it is.

    Running statistics that our plan freezes are frozen, which PEFT would let move and not save.

    Args:
        **options: of PEFT's LoraConfig, beside what our plan says, such as `init_lora_weights`.

    Attributes:
        plan: ours.
        trained: parameters that train.

    Raises:
        ConfigError: nothing to adapt, or what PEFT cannot adapt.
    """

    def __init__(self, task: LightningModule, config: LoRAConfig, **options: Any) -> None:
        self._planned = planned = planned_for_peft(task, config)
        peft = _imported()
        self.plan = planned.plan
        top = network_of(task, self.plan)
        options = {k: v for k, v in planned.about.items() if k not in NOT_PEFTS} | options
        self.model = peft.PeftModel(submodule(task, top), peft.LoraConfig(**options, inference_mode=False))
        for name, parameter in named_parameters(task).items():
            if ".lora_" not in name:
                parameter.requires_grad_(_plain(name) in planned.trained and UNUSED not in name)
        for name, module in dict(task.named_modules()).items():
            if has_statistics(module) and (UNUSED in name or _plain(name) not in planned.moving):
                freeze_statistics(module, config.implementation)
        self.trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
        self._task = task
        self._in_place = {name: tensor.detach().clone() for name, tensor in _changing(task).items()}
        _keep_trained_only(task)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network as it was before, also in what trains in place, which PEFT's own switch leaves on."""
        changed = {name: _changing(self._task)[name] for name in self._in_place}
        with self.model.disable_adapter(), holding(changed, self._in_place):
            yield

    def save(self, folder: str | os.PathLike[str], origin: Origin) -> None:
        """Write the adapter in PEFT's format, both files complete before either takes its place.

        Args:
            origin: what travels with it.
        """
        state: dict[str, Tensor] = _imported().get_peft_model_state_dict(
            self.model, save_embedding_layers=False
        )
        whole = self.model.state_dict()  # PEFT leaves out what it cannot name without naming others too
        state |= {key: whole[key] for key in self._planned.keys - state.keys()}
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in state.items()}
        about = self._planned.about
        metadata = peft_metadata(about, tensors, {**self._planned.extras, "origin": origin.to_dict()})
        write_pair(folder, json.dumps(about, indent=2) + "\n", tensors, metadata)


def _imported() -> Any:
    """PEFT, without what bitsandbytes, which it imports, says of products that are not used here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import peft
    finally:
        logger.setLevel(level)
    return peft


@dataclass(frozen=True)
class Planned:
    """Our plan, and what PEFT must know to carry it out.

    Attributes:
        about: what stands in PEFT's configuration file.
        keys: names of the tensors in its other file.
        trained: names of the model's own parameters that train.
        moving: names of the modules whose running statistics move.
        extras: what is known of the base.
    """

    plan: Plan
    about: dict[str, Any]
    keys: frozenset[str]
    trained: frozenset[str]
    moving: frozenset[str]
    extras: dict[str, Any]


def planned_for_peft(task: nn.Module, config: LoRAConfig) -> Planned:
    """What PEFT would do to a task, which is left as it is.

    Raises:
        ConfigError: nothing to adapt, or what PEFT cannot adapt.
    """
    if config.init not in INITS:
        raise ConfigError([
            f"lora.init={config.init!r}: method=peft begins as by {' or '.join(map(repr, INITS))}: give one "
            "of them, or method=lora."
        ])  # fmt: skip
    plan = inject(task, replace(config, restarts=0))  # PEFT has none, nor room for them
    try:
        saved = saved_adapter(task)
        with viewed_as_plain(task):
            about, tensors, metadata = to_peft(saved, task)
        updates = {id(p) for p in lora_parameters(task)}
        trained = {n for n, p in named_parameters(task).items() if p.requires_grad and id(p) not in updates}
        own = set(state_of(task).adapters["default"].extra_trainables)
        moving = {n for n, m in named_modules(task).items() if own & own_buffers(n, m).keys()}
    except ConfigError as error:
        raise ConfigError([_refusal(error.problems)]) from None
    finally:
        eject(task)
    extras = json.loads(metadata["lora_lightning"])
    return Planned(plan, about, frozenset(tensors), frozenset(trained), frozenset(moving), extras)


def _refusal(problems: list[str]) -> str:
    """What PEFT cannot adapt, in a line with the remedy."""
    told = [p.removeprefix('format="peft": ').removesuffix(f"{OURS}.").rstrip(" ;,or") for p in problems]
    layers = [t.partition(" is ")[0] for t in told if " is " in t]
    exclude = (
        f" Give lora.exclude_modules=[{','.join(layers)}], or method=lora."
        if layers
        else " Give method=lora."
    )
    return f"PEFT cannot adapt this model as method=lora does: {'; '.join(told)}.{exclude}"


def _plain(name: str) -> str:
    """The name that a tensor or module had before PEFT put its own around it."""
    return name.replace(COPY, "").replace(BASE, "")


def _frozen(task: nn.Module) -> set[str]:
    """Names of what stays as it was: frozen parameters, the buffers of frozen norms, and PEFT's originals."""
    names = {n for n, p in task.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name, module in task.named_modules():
        if isinstance(module, FrozenNorm):
            names |= {joined(name, n) for n, _ in module.named_buffers(recurse=False)}
    return names


def _changing(task: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, and running statistics that move, where they always were: not PEFT's updates and
    copies."""
    found: dict[str, Tensor] = {n: p for n, p in task.named_parameters() if p.requires_grad}
    for name, module in task.named_modules():
        if has_statistics(module) and not isinstance(module, FrozenNorm):
            found |= {joined(name, n): b for n, b in module.named_buffers(recurse=False)}
    return {name: t for name, t in found.items() if not any(p in name for p in (".lora_", COPY, UNUSED))}


def _keep_trained_only(task: nn.Module) -> None:
    """`task.state_dict()` leaves out what is frozen, and loading forgives its absence and that alone."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name in _frozen(task):
            state.pop(prefix + name, None)

    def forgive(module: nn.Module, incompatible: Any) -> None:
        frozen = _frozen(task)
        incompatible.missing_keys[:] = [n for n in incompatible.missing_keys if n not in frozen]

    task.register_state_dict_post_hook(drop)
    task.register_load_state_dict_post_hook(forgive)
