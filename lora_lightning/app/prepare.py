"""A task made ready for one method: what of it trains, and what its Trainer's checkpoints hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from torch import nn

from lora_lightning.adapters.inject import train_parts
from lora_lightning.adapters.quantize import quantize
from lora_lightning.adapters.state import state_of
from lora_lightning.app.build import lora_config, named
from lora_lightning.app.console import say
from lora_lightning.app.methods import ADAPTING, METHODS
from lora_lightning.app.peft_lora import PeftLoRA, planned_for_peft
from lora_lightning.compression.rebuild import about_weights
from lora_lightning.compression.result import Compressed
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.files.origin import Origin
from lora_lightning.files.save_load import save_adapter
from lora_lightning.files.weights import write_weights
from lora_lightning.planning.plan import Plan
from lora_lightning.planning.targets import head_alone, plan, plan_parts
from lora_lightning.trainer.callback import LoRACallback
from lora_lightning.trainer.exact_resume import ExactResume
from lora_lightning.trainer.hparams import logged
from lora_lightning.utils.copying import Before
from lora_lightning.utils.tables import percent


class Parts(NamedTuple):
    """What a method that adds nothing trains beside the head: options of LoRAConfig, and in words."""

    bias: str
    norm: str
    what: str


PARTS = {
    "bitfit": Parts("all", "frozen", "biases"),
    "norm_only": Parts("none", "affine", "weights and biases in normalization layers"),
}


class Tell(Callback):
    """Tells the loggers what a callback does, since the application's Trainer logs no hyperparameters by
    itself; and prints its plan when the data have decided it: before the fit it was not known.

    Args:
        adapting: the callback, which comes before this one.
    """

    def __init__(self, adapting: LoRACallback) -> None:
        self.adapting = adapting

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plan = self.adapting.plan
        assert plan is not None
        if self.adapting.config.by_data:
            say(f"{plan}\n")
        about = logged(self.adapting.config, plan, state_of(pl_module).adapter)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if not isinstance(logger, TensorBoardLogger):  # shows what was logged first, and that alone
                logger.log_hyperparams(about)


@dataclass
class Prepared:
    """What a method has made of a task.

    Attributes:
        trained, total: numbers of parameters.
        plan: what trains where the base stays as it is; None where everything trains, or nothing.
        adapting: the configuration of the callback that adapts, or has adapted, the task.
        peft: the task's network in PEFT's hands.
        spectra: what is logged of the updates after each epoch.
        compressed: how the network was made smaller before, if it was.
        before: what the network was, where all of it trains and that is wanted.
    """

    trained: int
    total: int
    plan: Plan | None = None
    adapting: LoRAConfig | None = None
    peft: PeftLoRA | None = None
    spectra: str = "none"
    compressed: Compressed | None = None
    before: Before | None = None

    def callbacks(self) -> list[Callback]:
        """For a Trainer of the task."""
        if self.adapting is None:
            return [ExactResume()]
        adapting = LoRACallback(self.adapting, verbose=False, spectra=self.spectra)
        return [adapting, Tell(adapting)]

    def decided(self, callbacks: Iterable[Callback]) -> bool:
        """Take the plan that data have decided in a fit with these callbacks; whether there is one."""
        for callback in callbacks:
            if isinstance(callback, LoRACallback) and callback.plan and callback.plan.by_data:
                self.plan = callback.plan
                self.trained, self.total = self.plan.trainable, self.plan.total
                return True
        return False


def prepare(task: LightningModule, config: DictConfig) -> Prepared:
    """Let train what the configuration's method trains.

    Raises:
        ConfigError: the model has nothing of the kind, or PEFT cannot adapt it.
    """
    method, total = config.method, sum(p.numel() for p in task.parameters())
    if method == "none":
        return Prepared(0, total)
    if method == "full":
        return Prepared(sum(p.numel() for p in task.parameters() if p.requires_grad), total)
    with named("lora"):
        lora = lora_config(config)
        if method == "lora":
            planned = plan(task, lora)
            if kind := config.lora.get("quantize"):
                quantize(task, kind, exclude_modules=planned.heads or None)
            return Prepared(planned.trainable, planned.total, planned, lora, spectra=config.lora.spectra)
        if method == "peft":
            peft = PeftLoRA(task, lora)
            return Prepared(peft.trained, peft.plan.total, peft.plan, peft=peft)
        parts = parts_of(task, method, lora)
        planned = train_parts(task, parts)
    return Prepared(planned.trainable, planned.total, planned, parts)


def check_method(task: LightningModule, method: str, config: DictConfig) -> None:
    """Whether a task, not yet prepared, can be trained by a method; it stays as it is.

    Raises:
        ConfigError: as `prepare`.
    """
    with named("lora"):
        lora = lora_config(config)
        if method == "lora":
            plan(task, lora)
        elif method == "peft":
            planned_for_peft(task, lora)
        elif method in ADAPTING:
            plan_parts(task, parts_of(task, method, lora))


def parts_of(task: nn.Module, method: str, config: LoRAConfig) -> LoRAConfig:
    """What a method that adds nothing trains, as a configuration without targets.

    The head is the one that the model's structure shows, since `modules_to_save` may name more than the head;
    what that names where none is seen.

    Raises:
        ConfigError: the model has no such parts.
    """
    found = _head(task, config)
    head = plan_parts(task, found).trainable if found else 0
    if method == "linear_probe":
        return found or head_alone(config)  # whose problem is told by the plan
    bare = found or replace(head_alone(config), modules_to_save=None)
    parts = PARTS[method]
    wanted = replace(bare, train_bias=parts.bias, train_norm=parts.norm)
    with contextlib.suppress(ConfigError):
        if plan_parts(task, wanted).trainable > head:
            return wanted
    raise ConfigError([
        f"{type(getattr(task, 'model', task)).__name__} has no {parts.what} outside of its head for "
        f"method={method} to train: give method=linear_probe, or method=lora."
    ])  # fmt: skip


def _head(task: nn.Module, config: LoRAConfig) -> LoRAConfig | None:
    """What trains the head alone, if there is one."""
    for saved in ("auto", config.modules_to_save):
        with contextlib.suppress(ConfigError):
            alone = head_alone(replace(config, modules_to_save=saved))
            plan_parts(task, alone)
            return alone
    return None


def save_trained(
    task: LightningModule, method: str, prepared: Prepared, folder: Path, origin: Origin
) -> None:
    """The adapter, or the whole model where everything was trained; nothing where nothing was."""
    if prepared.peft:
        prepared.peft.save(folder / "adapter", origin)
    elif prepared.adapting:
        save_adapter(task, folder / "adapter", origin=origin)
    elif method != "none":
        model: Any = task.model
        about = {"origin": origin.to_dict()}
        if prepared.compressed:
            about |= about_weights(prepared.compressed)
        write_weights(folder / "model.safetensors", model.state_dict(), about)


def in_words(method: str, label: str, prepared: Prepared) -> str:
    """What trains, to be printed before it does.

    Args:
        label: the method in words.
    """
    lines = [f"{label}: trains {METHODS[method].trains}"] if method != "lora" else []
    if prepared.plan and prepared.plan.by_data:  # its ranks are not known yet
        return "\n".join([*lines, f"{len(prepared.plan.layers)} layers are adapted; {prepared.plan.by_data}"])
    if prepared.plan:
        return "\n".join([*lines, str(prepared.plan)])
    share = percent(prepared.trained, prepared.total)
    return "\n".join([*lines, f"trainable: {prepared.trained:,} of {prepared.total:,} parameters ({share})"])
