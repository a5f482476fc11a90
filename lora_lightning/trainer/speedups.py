"""Speedups: channels_last, torch.compile, gradient checkpointing for any LightningModule, a switch each."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.recompute import Undo, recompute_blocks
from lora_lightning.trainer.strategies import UNSHARDED
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import Check

MODES = ("default", "reduce-overhead", "max-autotune")
COMPILE = Check(
    f"true, false, or a mode: {', '.join(MODES)}", lambda v: isinstance(v, bool) or v in MODES, MODES
)


class Speedups(pl.Callback):
    """Changes how the networks of a LightningModule compute while it is trained, not what: outputs and
    gradients are the same but for rounding. Its networks are its children with parameters. They are as before
    when the fit ends, names in checkpoints never change, and it goes with LoRACallback in either order.

    Args:
        channels_last: keep images and convolutions' weights with the channels last, as tensor cores want it.
        compile: `torch.compile` of each network, in place; a mode of its own, or true for "default".
        gradient_checkpointing: keep of each block its input alone, and make the rest again in the backward:
            less memory, about a third more time.

    Raises:
        ConfigError: at construction for bad options; when a fit begins, for a network without blocks, or
            channels_last under a strategy that shards parameters.
    """

    backend = "inductor"

    def __init__(
        self,
        channels_last: bool = False,
        compile: Annotated[bool | str, COMPILE] = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        require(Speedups, locals())
        self.channels_last, self.compile = channels_last, compile
        self.gradient_checkpointing = gradient_checkpointing
        self._undo: list[Undo] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.channels_last and not is_a(trainer.strategy, *UNSHARDED):
            name = type(trainer.strategy).__name__
            raise ConfigError([f"channels_last=True: {name} cuts parameters up; give false, or take ddp."])
        if self.channels_last and stage == "fit":  # before DDP notes how gradients lie
            pl_module.to(memory_format=torch.channels_last)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        networks = [m for m in pl_module.children() if next(m.parameters(), None) is not None]
        if self.channels_last:
            pl_module.to(memory_format=torch.channels_last)  # and what was built since
            self._undo.append(partial(pl_module.to, memory_format=torch.contiguous_format))
        for network in networks:
            if self.channels_last:
                hook = network.register_forward_pre_hook(_images_channels_last, with_kwargs=True)
                self._undo.append(hook.remove)
            if self.gradient_checkpointing:
                self._undo += recompute_blocks(network)
            if self.compile:
                mode = None if self.compile is True else self.compile
                network.compile(backend=self.backend, **({"mode": mode} if mode else {}))
                self._undo.append(partial(setattr, network, "_compiled_call_impl", None))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self._undo:
            self._undo.pop()()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)


def _images_channels_last(network: nn.Module, args: Any, options: Any) -> tuple[Any, Any]:
    def changed(value: Any) -> Any:
        image = isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if image else value

    return tuple(map(changed, args)), {name: changed(value) for name, value in options.items()}
