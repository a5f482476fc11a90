"""LoRACallback: LoRA in a Lightning Trainer. The hooks and only these; the work is done elsewhere."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.adapters import lora_parameters
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.inject import carry_out, eject, freeze_norms
from lora_lightning.layers.norm import FrozenNorm
from lora_lightning.plans import Plan
from lora_lightning.record import injection_of, is_injected
from lora_lightning.sharding import FIRST, refuse_sharded
from lora_lightning.state_hooks import keep_trained_only
from lora_lightning.strategies import prepare_restore, prepare_saving
from lora_lightning.targets import plan
from lora_lightning.verify import FirstSteps

UNSHARDED = (SingleDeviceStrategy, DDPStrategy)  # every process holds the parameters themselves


class LoRACallback(pl.Callback):
    """Injects LoRA into the LightningModule at setup, freezes its backbone, and keeps the Trainer's
    checkpoints down to what is trained.

    Args:
        config: what to adapt and how.
        verbose: print the plan when a fit begins.
        verify_strict: the first training steps check that every update is used and gets a finite
            gradient, and warn with the names of those that do not; true makes it an error.
        **options: fields of LoRAConfig, instead of `config`.

    Attributes:
        plan: what was adapted; None before setup.

    Raises:
        ConfigError: at construction for bad options, at setup when nothing can be adapted.
        UserError: when training begins and no optimizer holds the updates; after the first steps with
            `verify_strict`.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LoRACallback(rank=8, target_modules=["qkv"])])
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        verbose: bool = True,
        verify_strict: bool = False,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ConfigError([f"give a config or its fields ({', '.join(options)}), not both."])
        problems = LoRAConfig.problems(options)
        if not isinstance(verify_strict, bool):
            problems.append(f"verify_strict={verify_strict!r}: give true or false.")
        if problems:
            raise ConfigError(problems)
        self.config = config or LoRAConfig(**options)
        self.verbose, self.verify_strict = verbose, verify_strict
        self.plan: Plan | None = None
        self._first_steps: FirstSteps | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Inject now if the targets exist, and look again after `configure_model`, which may build
        layers; both come before the checkpoint is restored and before the optimizers are made."""
        if is_injected(pl_module):
            self._reuse(pl_module)
            return
        with contextlib.suppress(ConfigError):  # raised again after configure_model, if it stands
            self._inject(pl_module)
        self._after_configure_model(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        freeze_norms(pl_module)
        prepare_saving(trainer, pl_module)
        if all(m.training or isinstance(m, FrozenNorm) for m in pl_module.modules()):
            # Lightning warns of every module in eval mode; these are meant to be.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        if isinstance(trainer.strategy, UNSHARDED):
            self._first_steps = FirstSteps(pl_module)
        if self.verbose:
            rank_zero_info(f"\n{self.plan}\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers that were made without the updates: nothing would train."""
        if not isinstance(trainer.strategy, UNSHARDED):
            return  # sharded strategies hand other tensors to the optimizer
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        optimized = {id(p) for group in groups for p in group["params"]}
        if trainer.optimizers and not any(id(p) in optimized for p in lora_parameters(pl_module)):
            raise UserError(
                "no optimizer holds the LoRA parameters: make the optimizer in configure_optimizers, "
                "from self.parameters(), not from a list made in __init__."
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_steps is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._first_steps.after_backward(scaled=scaler is not None)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._first_steps is not None and self._first_steps.after_step():
            self._conclude(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_steps is not None and self._first_steps.observed:
            self._conclude(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """DDP stops in the second step when an update was not used in the first: say which."""
        if self._first_steps is not None and "Expected to have finished reduction" in str(exception):
            for fault in self._first_steps.faults():
                rank_zero_warn(fault)

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Report what the first steps showed, and look no more. Every process has the same verdict,
        that of the first, so that all of them stop or none."""
        assert self._first_steps is not None
        faults = trainer.strategy.broadcast(self._first_steps.faults())
        self._first_steps = None
        if faults and self.verify_strict:
            raise UserError("\n".join([*faults, "With verify_strict=False this is a warning."]))
        for fault in faults:
            rank_zero_warn(fault)

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict()}

    def _inject(self, pl_module: pl.LightningModule) -> None:
        refuse_sharded(pl_module, "inject", FIRST)
        self.plan = plan(pl_module, self.config)
        carry_out(pl_module, self.config, self.plan)
        keep_trained_only(pl_module)
        prepare_restore(pl_module)

    def _reuse(self, pl_module: pl.LightningModule) -> None:
        """setup runs again for validate, test, predict and a second fit."""
        injection = injection_of(pl_module)
        if injection.config != self.config:
            raise ConfigError([
                "the model is adapted already, with another configuration; call "
                "lora_lightning.eject(model) before a fit with this one."
            ])  # fmt: skip
        self.plan = injection.plan
        keep_trained_only(pl_module)
        prepare_restore(pl_module)

    def _after_configure_model(self, pl_module: pl.LightningModule) -> None:
        """Wrap the module's `configure_model`, once, to inject into layers that are built after setup."""
        names = {n for n, _ in pl_module.named_parameters()}
        original = pl_module.configure_model

        def configure_model() -> None:
            del pl_module.__dict__["configure_model"]
            original()
            if is_injected(pl_module):
                if {n for n, _ in pl_module.named_parameters()} == names:
                    return
                eject(pl_module)
            self._inject(pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]
