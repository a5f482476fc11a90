"""When a LightningModule is adapted, at setup or around its configure_model, and what Lightning is told."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lora_lightning.adapters.base_values import replaced
from lora_lightning.adapters.by_data import begin_with
from lora_lightning.adapters.eject import eject
from lora_lightning.adapters.inject import apply_plan, check_adapter
from lora_lightning.adapters.manage import add_adapter, set_adapter
from lora_lightning.adapters.state import is_injected, state_of
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.layers.views import hold
from lora_lightning.planning.plan import Plan
from lora_lightning.planning.targets import plan
from lora_lightning.trainer.averaging import average_the_adapted
from lora_lightning.trainer.checkpoint import describe_checkpoints
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.measuring import decide_in_fit, refuse_strategy
from lora_lightning.trainer.state_dict import keep_trained_only
from lora_lightning.trainer.strategies import (
    UNSHARDED,
    prepare_precision,
    prepare_restore,
    refuse_quantized,
)
from lora_lightning.utils.names import named_parameters
from lora_lightning.utils.sharding import FIRST, refuse_sharded


@dataclass
class Injector:
    """Adapts the LightningModule of a Trainer after all that builds layers and loads base weights, and before
    the checkpoint is restored and the optimizers are made.

    Attributes:
        adapter: name of the updates; None is "default", or what is selected already.
        full: whether checkpoints hold the frozen weights too.
        check_base: whether they are refused on other frozen weights.
        plan: what was adapted; None before.
    """

    config: LoRAConfig
    adapter: str | None
    full: bool
    check_base: bool
    plan: Plan | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adapt the module now, or after its own `setup` and `configure_model`; one that is adapted already
        as it is.

        Raises:
            ConfigError, UserError: as `LoRACallback`.
        """
        if is_injected(pl_module):
            self._reuse(pl_module)
            self._prepare(trainer, pl_module)
            return
        if self.config.by_data and trainer.state.fn == "fit":
            refuse_strategy(trainer, self.config)
            self._before_restore(trainer, pl_module)
            return
        if not _has_own(pl_module, "setup", "configure_model"):
            self._try_to_inject(trainer, pl_module)
        if not is_injected(pl_module):
            self._around_configure_model(trainer, pl_module)

    def _inject(self, pl_module: pl.LightningModule) -> None:
        refuse_sharded(pl_module, "inject", FIRST)
        self.plan = plan(pl_module, self.config)
        apply_plan(pl_module, self.config, self.plan, self.adapter or "default")

    def _before_restore(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Wrap what restores a checkpoint, once, to inject before it: then the module is as its own `setup`
        and `configure_model` have made it, its data are set up, and it is known whether the run is resumed.
        A resumed one takes ranks and values from its checkpoint and sees no data."""
        connector = trainer._checkpoint_connector
        name = "_restore_modules_and_callbacks"
        original = partial(getattr(type(connector), name), connector)  # a fit that failed may have left ours

        def restore(checkpoint_path: Any = None, *rest: Any) -> None:
            del connector.__dict__[name]
            if checkpoint_path is None and connector._hpc_resume_path is None:
                self._inject_by_data(trainer, pl_module)
            else:
                self._inject(pl_module)
            self._prepare(trainer, pl_module)
            original(checkpoint_path, *rest)

        connector.__dict__[name] = restore

    def _inject_by_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_sharded(pl_module, "inject", FIRST)
        adapter = self.adapter or "default"
        check_adapter(pl_module, self.config, adapter)
        decision = decide_in_fit(trainer, pl_module, self.config)
        self.plan = decision.plan
        apply_plan(pl_module, self.config, decision.plan, adapter)
        begin_with(pl_module, decision, adapter)

    def _try_to_inject(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with contextlib.suppress(ConfigError):  # raised again after configure_model, if it stands
            self._inject(pl_module)
            self._prepare(trainer, pl_module)

    def _reuse(self, pl_module: pl.LightningModule) -> None:
        """setup runs again for validate, test, predict and a second fit."""
        state = state_of(pl_module)
        state.choice.stay()  # what is trained here is the model's own choice
        hold(None, state.choice)
        state.begun = True
        name = self.adapter or state.adapter
        if name not in state.adapters:
            add_adapter(pl_module, name, self.config)
        elif state.adapters[name].config != self.config:
            raise ConfigError([
                "the model is adapted already, with another configuration: give this one another name, "
                "LoRACallback(adapter=NAME), or call lora_lightning.eject(model) before."
            ])  # fmt: skip
        if name not in state.active:
            set_adapter(pl_module, name)
        self.plan = state.plan

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What other parts of Lightning must know of an injected module."""
        refuse_quantized(trainer, pl_module)
        prepare_precision(trainer, pl_module)
        keep_trained_only(pl_module, full=self.full)
        describe_checkpoints(pl_module, is_a(trainer.strategy, *UNSHARDED), self.check_base)
        average_the_adapted(trainer, pl_module)
        prepare_restore(trainer, pl_module)

    def _around_configure_model(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wrap the module's `configure_model`, once, to inject after it; where it may shard the model, before
        it, and again after it if it has built layers."""
        original = pl_module.configure_model

        def configure_model() -> None:
            del pl_module.__dict__["configure_model"]
            if not is_a(trainer.strategy, *UNSHARDED):
                self._try_to_inject(trainer, pl_module)
            names = set(named_parameters(pl_module))
            original()
            if is_injected(pl_module):
                if set(named_parameters(pl_module)) == names and not replaced(pl_module):
                    self._prepare(trainer, pl_module)  # again, the base may have other weights now
                    return
                eject(pl_module)
            self._inject(pl_module)
            self._prepare(trainer, pl_module)

        pl_module.__dict__["configure_model"] = configure_model


def _has_own(pl_module: pl.LightningModule, *hooks: str) -> bool:
    """Whether the module has one of these hooks of its own; they run after Callback.setup."""
    packages = [getattr(type(pl_module), hook).__module__.partition(".")[0] for hook in hooks]
    return any(package not in ("lightning", "pytorch_lightning") for package in packages)
