"""LoRACallback: LoRA in a Lightning Trainer. The hooks and only these; the work is done elsewhere."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.adapters import quantize as quantization
from lora_lightning.adapters.base_values import begin_training, refuse_replaced
from lora_lightning.adapters.inject import ADAPTER_NAME, freeze_norms
from lora_lightning.adapters.state import is_injected, state_of
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.layers.norm import FrozenNorm
from lora_lightning.planning.peft_config import config_of
from lora_lightning.planning.plan import Plan
from lora_lightning.trainer.averaging import keep_equal_values
from lora_lightning.trainer.checkpoint_io import write_checkpoints_whole
from lora_lightning.trainer.collapse import CollapseWatch
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.exact_resume import ExactResume
from lora_lightning.trainer.first_steps import GradientMonitor
from lora_lightning.trainer.gradient_norm import UpdateGradients
from lora_lightning.trainer.hparams import log_plan, log_to_all, logged
from lora_lightning.trainer.injecting import Injector
from lora_lightning.trainer.objective import Objective
from lora_lightning.trainer.refusals import (
    refuse_beside,
    refuse_untrained,
    warn_of_hparams,
    warn_of_random_base,
)
from lora_lightning.trainer.restarting import Restarts, restarts_of_fit
from lora_lightning.trainer.spectra import hide_layers, log_spectra, log_spectra_table
from lora_lightning.trainer.strategies import UNSHARDED, prepare_saving
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import one_of

CHECKPOINTS = ("adapter", "full")
SPECTRA = ("mean", "layers", "none")
OWN_OPTIONS = (  # beside LoRAConfig's
    "adapter",
    "checkpoint",
    "verbose",
    "verify_strict",
    "check_base",
    "watch_collapse",
    "spectra",
)


class LoRACallback(ExactResume):
    """Injects LoRA into the LightningModule at setup, freezes its backbone, keeps the Trainer's
    checkpoints down to what is trained, writes them whole or not at all, and lets a run resumed from one
    go on as if it had never stopped.

    Its configuration and the numbers of parameters go to the Trainer's loggers, as hyperparameters under
    `LoRACallback`; the plan as a table, where a logger shows tables, or beside its `metrics.csv`; while it
    trains `lora/grad_norm`, the length of the updates' gradient before clipping, and what `spectra` says.

    Args:
        config: what to adapt and how; a mapping of LoRAConfig's fields and PEFT's `LoraConfig` will do.
        adapter: name of the updates. A module that is adapted already, by an earlier fit, gets one more
            adapter of this name; the earlier ones stay in it and in its checkpoints, and do not train. One
            that the module has trains as it is, where no configuration is given beside its name. None is
            "default", or what is selected in a module that is adapted already.
        checkpoint: "adapter", or "full" for checkpoints with the frozen weights too; a run with either
            resumes from both.
        verbose: print the plan when a fit begins.
        verify_strict: the first training steps check that every update is used and gets a finite
            gradient, and warn with the names of those that do not; true makes it an error.
        check_base: refuse checkpoints of a run whose frozen weights had other values.
        watch_collapse: end a training that has collapsed with an error that says what to change: its loss is
            not finite, stays above where it began, has lost what it had gained, or has gained nothing while
            the updates outgrew their weights. False trains on.
        spectra: what is logged after each epoch of the updates, of which rank, how even and how large they
            are: "mean" over the layers, as `lora/effective_rank`, `lora/stable_rank` and
            `lora/relative_norm` (`spectra` of the package), and `lora/update_norm`, the length of all of
            them; "layers", of each layer beside it; or "none". After training each layer's in a table.
        **options: fields of LoRAConfig, instead of `config`.

    Attributes:
        plan: what was adapted; None before setup.

    Raises:
        ConfigError: at construction for bad options, at setup when nothing can be adapted, when a fit begins
            for a `regularizer` that cannot be added to the loss.
        UserError: at setup for quantized weights under a strategy that shards; when training begins and no
            optimizer holds the updates; after the first steps with `verify_strict`; when it collapses.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LoRACallback(rank=8, target_modules=["qkv"])])
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        adapter: Annotated[str | None, ADAPTER_NAME] = None,
        checkpoint: Annotated[str, one_of(*CHECKPOINTS)] = "adapter",
        verbose: bool = True,
        verify_strict: bool = False,
        check_base: bool = True,
        watch_collapse: bool = True,
        spectra: Annotated[str, one_of(*SPECTRA)] = "mean",
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ConfigError(
                [f"a config and fields of one ({', '.join(options)}) are given: give one of the two."]
            )
        require(LoRACallback, locals(), LoRAConfig.problems(options, beside=OWN_OPTIONS))
        super().__init__()
        self.config = LoRAConfig(**options) if config is None else config_of(config)
        self.adapter = adapter
        self._as_it_is = adapter is not None and config is None and not options
        self.checkpoint, self.verbose, self.verify_strict = checkpoint, verbose, verify_strict
        self.check_base, self.watch_collapse, self.spectra = check_base, watch_collapse, spectra
        self._injector: Injector | None = None
        self._first_steps: GradientMonitor | None = None
        self._collapse: CollapseWatch | None = None
        self._objective: Objective | None = None
        self._restarts: Restarts | None = None
        self._gradients: UpdateGradients | None = None
        self._norms: dict[str, Tensor] = {}  # of the base weights of this fit
        self._restored_seed: int | None = None  # of the restarts of the run that is resumed
        self._logged: tuple[list[int], dict[str, Any]] | None = None

    @property
    def plan(self) -> Plan | None:
        """What was adapted; None before setup."""
        return None if self._injector is None else self._injector.plan

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Inject now, or after `setup` and `configure_model` of the module's own, which may build layers and
        load base weights; all that comes before the checkpoint is restored and the optimizers are made."""
        refuse_beside(trainer)
        if is_a(trainer.strategy, *UNSHARDED):
            write_checkpoints_whole(trainer.strategy)
        if self._as_it_is and is_injected(pl_module) and self.adapter in state_of(pl_module).adapters:
            self.config = state_of(pl_module).adapters[self.adapter].config
        self._injector = Injector(self.config, self.adapter, self.checkpoint == "full", self.check_base)
        self._injector.setup(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_replaced(pl_module)
        assert self._injector is not None
        self._injector.plan = state_of(pl_module).plan  # a checkpoint may have brought another
        self._restarts = restarts_of_fit(trainer, pl_module, self._restored_seed)
        freeze_norms(pl_module)
        prepare_saving(trainer, pl_module)
        keep_equal_values(trainer)
        meant = {m for norm in pl_module.modules() if isinstance(norm, FrozenNorm) for m in norm.modules()}
        if all(m.training or m in meant for m in pl_module.modules()):
            # Lightning warns of every module in eval mode; frozen norms are meant, and what timm puts in one.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        if is_a(trainer.strategy, *UNSHARDED):
            self._first_steps = GradientMonitor(pl_module)
            warn_of_random_base(pl_module)
        warn_of_hparams(trainer, pl_module)
        if weights := self.config.regularizer:
            self._objective = Objective(trainer, pl_module, weights, self._before_terms)
            self._objective.begin()
        self._log(trainer, pl_module)
        if self.verbose:
            lines = [str(self.plan), quantization.summary(pl_module)]
            rank_zero_info("\n" + "\n".join(filter(None, lines)) + "\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers that were made without the updates: nothing would train."""
        if is_a(trainer.strategy, *UNSHARDED):  # sharded ones hand other tensors to the optimizer
            refuse_untrained(trainer, pl_module)
            begin_training(pl_module)
        self._collapse = CollapseWatch(pl_module) if self.watch_collapse else None
        self._gradients, self._norms = UpdateGradients(pl_module), {}
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        if self._restarts is not None:
            self._restarts.before_batch(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_steps is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._first_steps.after_backward(scaled=scaler is not None)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._gradients is not None:
            self._gradients.before_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, *args)
        if self._first_steps is not None and self._first_steps.after_step():
            self._conclude(trainer)
        losses = outputs if self._objective is None else self._objective.loss  # what is added may grow
        if self._collapse is not None and (fault := self._collapse.after_batch(losses, trainer)):
            raise UserError(fault)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.spectra != "none":
            log_spectra(trainer, pl_module, self.spectra == "layers", self._norms)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._first_steps is not None and self._first_steps.observed:
            self._conclude(trainer)
        if self.spectra != "none":
            log_spectra_table(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._end_objective()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """DDP stops in the second step when an update was not used in the first: say which."""
        if self._first_steps is not None and "Expected to have finished reduction" in str(exception):
            for fault in self._first_steps.faults():
                rank_zero_warn(fault)
        self._end_objective()

    def _before_terms(self, loss: Tensor) -> None:
        if self._first_steps is not None:
            self._first_steps.before_terms(loss)

    def _end_objective(self) -> None:
        if self._objective is not None:
            self._objective.end()
            self._objective = None

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Report what the first steps showed, and look no more. Every process has the same verdict,
        that of the first, so that all of them stop or none."""
        assert self._first_steps is not None
        faults = trainer.strategy.broadcast(self._first_steps.faults())
        self._first_steps = None
        if faults and self.verify_strict:
            raise UserError(
                "\n".join([*faults, "The training ends here: give verify_strict=False to be warned alone."])
            )
        for fault in faults:
            rank_zero_warn(fault)

    def state_dict(self) -> dict[str, Any]:
        seed = {} if self._restarts is None else {"restarts_seed": self._restarts.seed}
        return {"config": self.config.to_dict(), **seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_seed = state_dict.get("restarts_seed")

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the Trainer's loggers, once, also when the same fit goes on."""
        assert self.plan is not None
        about = logged(self.config, self.plan, state_of(pl_module).adapter)
        if self._logged != (told := ([id(logger) for logger in trainer.loggers], about)):
            log_to_all(trainer, pl_module, about)
            log_plan(trainer, self.plan)
            if self.spectra == "layers":
                hide_layers(trainer)
            self._logged = told
