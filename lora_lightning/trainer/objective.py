"""The objective L + λ·R of a LightningModule: terms are added to what its training_step gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial, update_wrapper
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lora_lightning.adapters.regularization import WeightTerms
from lora_lightning.errors import ConfigError
from lora_lightning.trainer.base_outputs import BaseOutputs
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED


class Objective:
    """Adds λ·R to the losses of a module, inside of whatever calls its training_step: mixed precision, a
    scaler, DDP, accumulation and clipping see one loss. Logs each term, as `regularizer/frobenius`, and what
    is added, `regularizer/added`.

    Args:
        trainer: that fits the module.
        module: the module that was given to `inject`.
        weights: λ by the names of the terms.
        before: called with each loss of the module's own, before anything is added.

    Attributes:
        loss: the module's own of the last step; None where it gave none.

    Raises:
        ConfigError: a module that takes its optimizers' steps itself, a strategy that shards, or nothing
            trains of which a term speaks.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        weights: Mapping[str, float],
        before: Callable[[Tensor], None],
    ) -> None:
        _refuse(trainer, module, weights)
        self.module, self.weights, self._before_terms = module, weights, before
        self.loss: Tensor | None = None
        self._of_weights = WeightTerms(module, weights)
        self._outputs = BaseOutputs(module) if "outputs" in weights else None
        self._replaced: Any = None

    def begin(self) -> None:
        """From now on the module's training_step gives L + λ·R."""
        self._replaced = self.module.__dict__.get("training_step")  # of torch.compile, or a user's own
        step = self.module.training_step
        # A partial, which a copy of the module copies with it; wrapped, so that its arguments are still seen.
        self.module.__dict__["training_step"] = update_wrapper(partial(self._step, step), step)

    def end(self) -> None:
        """The module is as it was."""
        del self.module.__dict__["training_step"]
        if self._replaced is not None:
            self.module.__dict__["training_step"] = self._replaced

    def _step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._outputs is None else self._outputs.listening():
            given = training_step(*args, **kwargs)
        loss = given.get("loss") if isinstance(given, Mapping) else given
        self.loss = None
        if not isinstance(loss, Tensor):  # a step that is skipped, or what Lightning refuses
            return given
        self.loss = loss.detach()
        self._before_terms(loss)
        whole = loss + self._added().to(loss.device)
        return {**given, "loss": whole} if isinstance(given, Mapping) else whole

    def _added(self) -> Tensor:
        terms = self._of_weights()
        if self._outputs is not None:
            terms["outputs"] = self._outputs.distance()
        added: Any = sum(weight * terms[name] for name, weight in self.weights.items())
        logged = {**terms, "added": added}
        self.module.log_dict({f"regularizer/{name}": value.detach() for name, value in logged.items()})
        return added


def _refuse(trainer: pl.Trainer, module: pl.LightningModule, weights: Mapping[str, float]) -> None:
    given = f"regularizer={dict(weights)}"
    if not module.automatic_optimization:
        raise ConfigError([
            f"{given}: {type(module).__name__} takes its optimizers' steps itself "
            "(automatic_optimization=False), and its loss is not seen: leave it out, and add "
            "lora_lightning.regularization(self) to the loss in training_step."
        ])  # fmt: skip
    if not is_a(trainer.strategy, *UNSHARDED):
        raise ConfigError([
            f"{given}: {type(trainer.strategy).__name__} cuts the updates up, and no process has a whole "
            'one: take strategy="ddp", or leave it out.'
        ])  # fmt: skip
