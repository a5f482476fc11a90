"""What Lightning's sharding strategies need beyond the hooks on the module."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lora_lightning.errors import UserError
from lora_lightning.files.checkpoint_read import checked, read_checkpoint
from lora_lightning.kernels.quantized_tensor import is_quantized
from lora_lightning.layers.registry import lora_layers
from lora_lightning.trainer.compat import is_a
from lora_lightning.trainer.state_dict import keep_trained_only_of, refuse_misfit

UNSHARDED = ("SingleDeviceStrategy", "DDPStrategy")  # every process holds the parameters themselves


def refuse_quantized(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Strategies that cut parameters up would make floats of quantized ones.

    Raises:
        UserError: this is one, and the model has some.
    """
    if not is_a(trainer.strategy, *UNSHARDED) and any(is_quantized(p) for p in model.parameters()):
        raise UserError(
            f"{type(trainer.strategy).__name__} shards the parameters, which quantized weights do not allow: "
            'take strategy="ddp", where each process holds the few bits of all, or do not quantize.'
        )


def prepare_precision(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Updates stay float32 in a half-precision model. DeepSpeed keeps float32 copies of what it trains, and
    asks for one dtype.

    Raises:
        UserError: FSDP would have to put updates and weights of two dtypes into one flat parameter.
    """
    precision = getattr(trainer.precision_plugin, "precision", "")
    if is_a(trainer.strategy, "FSDPStrategy") and precision in ("bf16-true", "16-true"):
        mixed = precision.replace("true", "mixed")
        raise UserError(
            f"precision={precision!r}: updates stay float32, where small steps are not lost, and FSDP puts "
            f'them into one flat parameter with the weights. Take precision="{mixed}", or '
            "ModelParallelStrategy (FSDP2)."
        )
    if is_a(trainer.strategy, "DeepSpeedStrategy"):
        for layer in lora_layers(model).values():
            for update in (u for adapter in layer.lora for u in layer.updates(adapter)):
                update.becomes_half = True


def prepare_restore(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Let the strategy refuse a damaged checkpoint before it restores from it.

    ModelParallelStrategy loads parameter by parameter, without the module's own hooks: what is frozen is
    forgiven by `strict_loading`, and what must be in the checkpoint is looked for before.
    """
    strategy: Any = trainer.strategy
    strategy.load_checkpoint = partial(_load_checked, strategy)
    if is_a(strategy, "ModelParallelStrategy"):
        model.strict_loading = False


def _load_checked(strategy: Any, path: Any, *args: Any, **options: Any) -> Any:
    """The strategy's own `load_checkpoint`. Those that shard put the weights into the model in it, so that
    the file is read before; a folder of shards they check themselves.

    Raises:
        AdapterFileError: the file is damaged, or does not fit the model's updates.
    """
    if is_a(strategy, *UNSHARDED):
        return checked(type(strategy).load_checkpoint(strategy, path, *args, **options), path)
    if not Path(path).is_dir() and "://" not in str(path):
        whole = read_checkpoint(path, mmap=True)
        if is_a(strategy, "ModelParallelStrategy"):
            refuse_misfit(strategy.lightning_module, whole["state_dict"])
    return type(strategy).load_checkpoint(strategy, path, *args, **options)


def prepare_saving(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """FSDP gathers the parameters of its own wrapper, around the module."""
    wrapper = trainer.strategy.model
    if is_a(trainer.strategy, "FSDPStrategy") and wrapper is not None and wrapper is not model:
        keep_trained_only_of(wrapper, model)
