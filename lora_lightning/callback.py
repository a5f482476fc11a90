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
from lora_lightning.inject import carry_out, eject, freeze_norms, injection_of, is_injected
from lora_lightning.layers.norm import FrozenNorm
from lora_lightning.plans import Plan
from lora_lightning.report import listed
from lora_lightning.state_hooks import keep_trained_only
from lora_lightning.targets import plan
from lora_lightning.verify import dead_updates


class LoRACallback(pl.Callback):
    """Injects LoRA into the LightningModule at setup, freezes its backbone, and keeps the Trainer's
    checkpoints down to what is trained.

    Args:
        config: what to adapt and how.
        verbose: print the plan when a fit begins.
        **options: fields of LoRAConfig, instead of `config`.

    Attributes:
        plan: what was adapted; None before setup.

    Raises:
        ConfigError: at construction for bad options, at setup when nothing can be adapted.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LoRACallback(rank=8, target_modules=["qkv"])])
    """

    def __init__(self, config: LoRAConfig | None = None, *, verbose: bool = True, **options: Any) -> None:
        if config is not None and options:
            raise ConfigError([f"give a config or its fields ({', '.join(options)}), not both."])
        if problems := LoRAConfig.problems(options):
            raise ConfigError(problems)
        self.config = config or LoRAConfig(**options)
        self.verbose = verbose
        self.plan: Plan | None = None
        self._steps_to_check = 0

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
        if all(m.training or isinstance(m, FrozenNorm) for m in pl_module.modules()):
            # Lightning warns of every module in eval mode; these are meant to be.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        self._steps_to_check = 2
        if self.verbose:
            rank_zero_info(f"\n{self.plan}\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers that were made without the updates: nothing would train."""
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return  # sharded strategies hand other tensors to the optimizer
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        optimized = {id(p) for group in groups for p in group["params"]}
        if trainer.optimizers and not any(id(p) in optimized for p in lora_parameters(pl_module)):
            raise UserError(
                "no optimizer holds the LoRA parameters: make the optimizer in configure_optimizers, "
                "from self.parameters(), not from a list made in __init__."
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the first steps, name the updates that no gradient reaches."""
        if not self._steps_to_check:
            return
        self._steps_to_check -= 1
        dead = dead_updates(pl_module)
        if not dead:
            self._steps_to_check = 0
        elif not self._steps_to_check:
            rank_zero_warn(
                f"{len(dead)} of {len(injection_of(pl_module).plan.layers)} adapted layers get no "
                f"gradient: {listed(dead)}. They are not used "
                "in the forward, or their output does not reach the loss. Name them in exclude_modules."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict()}

    def _inject(self, pl_module: pl.LightningModule) -> None:
        self.plan = plan(pl_module, self.config)
        carry_out(pl_module, self.config, self.plan)
        keep_trained_only(pl_module)

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
