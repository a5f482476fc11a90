"""EMA: the exponential moving average of what trains, which is what is validated, tested and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.trainer.averaging import moving_norms
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.strategies import UNSHARDED
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import above
from lora_lightning.utils.names import named_buffers, named_parameters, stored_name

KEY = "lora_lightning_ema"  # in a Trainer's checkpoint


class EMA(pl.Callback):
    """Keeps an exponential moving average of what trains, in float32, and nothing of what is frozen: with
    LoRA it is as small as the adapter. Lightning's EMAWeightAveraging copies the whole model.

    Validation sees the averages, checkpoints hold them as the model's weights (and what trains beside them,
    by which a run goes on exactly), and the module has them when the fit ends. Running statistics of norms
    that move are averaged too. What begins to train later is averaged from then on.

    Args:
        decay: share that an average keeps in each optimizer step.
        warmup: in the first steps keep less, (1 + n) / (10 + n) after n of them, as TensorFlow's
            ExponentialMovingAverage does; otherwise a short fit is mostly its beginning.

    Raises:
        ConfigError: at construction for bad options; when a fit begins under a strategy that shards, or
            beside a ModelCheckpoint with `save_weights_only`, which asks no callback and would save the last
            step.
    """

    def __init__(
        self,
        decay: Annotated[float, above(0, below=1, note="0.99 to 0.9999 are usual")] = 0.999,
        warmup: bool = True,
    ) -> None:
        require(EMA, locals())
        self.decay, self.warmup = decay, warmup
        self._kept: dict[str, Tensor] = {}  # the averages; while they are in the module what trains
        self._swapped = False
        self._updates = self._step = 0
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not is_a(trainer.strategy, *UNSHARDED):
            raise ConfigError([
                "EMA: a strategy that shards parameters has no place for averages of them: leave it out."
            ])  # fmt: skip
        if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
            raise ConfigError([
                "save_weights_only=True: such a checkpoint would hold the weights of the last step, not "
                "EMA's averages. Give save_weights_only=False."
            ])  # fmt: skip

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(KEY) if trainer.state.fn == "fit" else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = averaged_tensors(pl_module)
        self._kept = {n: t.detach().to(_wide(t), copy=True) for n, t in tensors.items()}
        self._swapped, self._updates, self._step = False, 0, trainer.global_step
        if (saved := self._restored) is not None:
            self._updates, self._step = saved["updates"], saved["step"]
            known = {**named_parameters(pl_module), **named_buffers(pl_module)}  # what trains may change
            self._kept |= {n: known[n].detach().to(_wide(known[n]), copy=True) for n in saved["averages"]}
            for name, average in saved["averages"].items():
                self._kept[name].copy_(average)
            _give({n: known[n] for n in saved["current"]}, saved["current"])
            self._restored = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._update(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._swapped:
            self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._swapped:
            self._swap(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _give(self._training(pl_module), self._kept)
        self._kept = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that has nothing left to do ends without `on_train_end`."""
        if self._kept:
            self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._kept:
            return
        self._update(trainer, pl_module)  # another callback may save before ours had its turn
        here = {n: t.detach() for n, t in self._training(pl_module).items()}
        averages, current = (here, self._kept) if self._swapped else (self._kept, here)
        checkpoint[KEY] = {
            "averages": averages, "current": current, "updates": self._updates, "step": self._step,
        }  # fmt: skip
        state = checkpoint["state_dict"]
        for name, average in averages.items():
            stored = name if name in state else stored_name(pl_module, name)
            state[stored] = average.to(here[name].dtype)

    def average_anew(self, pl_module: pl.LightningModule, parameters: Iterable[nn.Parameter]) -> None:
        """Begin the averages of these anew, with their values of now.

        Args:
            pl_module: the module that is trained.
            parameters: of it.
        """
        meant = {id(p) for p in parameters}
        for name, tensor in self._training(pl_module).items():
            if id(tensor) in meant:
                self._kept[name].copy_(tensor.detach())

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once for each optimizer step."""
        if trainer.global_step <= self._step or self._swapped:
            return
        self._step = trainer.global_step
        self._updates += 1
        early = (1 + self._updates) / (10 + self._updates) if self.warmup else 1.0
        share = 1 - min(self.decay, early)
        with torch.no_grad():
            for name, tensor in self._training(pl_module).items():
                self._kept[name].lerp_(tensor.to(self._kept[name].dtype), share)

    def _training(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """As `averaged_tensors`; the average of what has begun to train is what it is, and there is none any
        more of what has stopped."""
        tensors = averaged_tensors(pl_module)
        fresh = {n: t.detach().to(_wide(t), copy=True) for n, t in tensors.items() if n not in self._kept}
        self._kept = {n: (self._kept | fresh)[n] for n in tensors}
        return tensors

    def _swap(self, pl_module: pl.LightningModule) -> None:
        tensors = self._training(pl_module) if self._kept else {}
        before = {n: t.detach().to(_wide(t), copy=True) for n, t in tensors.items()}
        _give(tensors, self._kept)
        self._kept, self._swapped = before, not self._swapped


def averaged_tensors(module: pl.LightningModule) -> dict[str, Tensor]:
    """The parameters that train, and the running statistics that move, by name."""
    parameters = {n: p for n, p in named_parameters(module).items() if p.requires_grad}
    moving = {id(b) for norm in moving_norms(module) for b in norm.buffers(recurse=False)}
    buffers = named_buffers(module).items()
    return {**parameters, **{n: b for n, b in buffers if id(b) in moving and b.is_floating_point()}}


def _give(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _wide(tensor: Tensor) -> torch.dtype:
    """Averages of half precision would lose small steps."""
    return torch.promote_types(tensor.dtype, torch.float32)
