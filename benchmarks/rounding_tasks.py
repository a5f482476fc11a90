"""The tasks of benchmarks.rounding: the digits' ViT and the accents' recognizer, in float32 or bfloat16.

Base weights and activations are bfloat16 where asked, normalization layers float32. What trains is float32
always, and a trained head is rounded for its use, so that W' = W + s·B·A alone differs between the ways of
rounding. Everything random is a function of the seed and the step: every way sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_lightning as ll
from benchmarks import accents, tune_digits
from lora_lightning.data.accents import VOCABULARY, AccentsDataModule
from lora_lightning.data.digits import DigitsDataModule, render
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.error_rates import Transcript, error_rate

NORMS = (nn.LayerNorm, nn.BatchNorm1d)


class Task(Protocol):
    """A pretrained model and data to adapt it to.

    Attributes:
        score: what `evaluate` gives beside the loss, in percent.
        lr: the recipe's.
        clip: the largest norm of the gradient; None does not clip.
        lora: LoRA's options.
    """

    score: ClassVar[str]
    lr: ClassVar[float]
    clip: ClassVar[float | None]
    lora: ClassVar[dict[str, Any]]

    def module(self) -> L.LightningModule:
        """The pretrained model as `module.model`, float32."""

    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches, without end."""

    def loss(self, module: Any, batch: Any) -> Tensor:
        """Of a training batch."""

    def evaluate(self, module: Any) -> tuple[float, float]:
        """Loss and score of the validation data."""


class Digits:
    """The recipe vit_digits."""

    score, lr, clip, lora = "accuracy", 4e-3, None, tune_digits.LORA

    def __init__(self) -> None:
        self._validation = _set_up(DigitsDataModule()).val_set.tensors

    def module(self) -> L.LightningModule:
        module = tune_digits.classifier("vit", self.lr)
        _cast_inputs_of(module.model.patch_embed.proj)
        return module

    def batches(self, seed: int) -> Iterator[Any]:
        for scans, labels in _without_end(_set_up(DigitsDataModule(seed=seed)).train_dataloader(), seed):
            yield render(scans, "target"), labels

    def loss(self, module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images).float(), labels)

    def evaluate(self, module: Any) -> tuple[float, float]:
        images, labels = self._validation
        logits = module(images).float()
        right = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels).item(), 100 * right.item()


class Accents:
    """The recipe accent_espeak for Scottish English, but for attention: it reads its weights, and so has no
    branch to compare with. Spectrograms are float32."""

    score, lr, clip = "word error rate", accents.RATES["lora"], 5.0
    lora = accents.LORA | {"exclude_modules": ["*self_attn*"]}

    def __init__(self) -> None:
        self._validation = list(_set_up(AccentsDataModule(kept=())).val_dataloader())

    def module(self) -> L.LightningModule:
        model = conformer_ctc(VOCABULARY, checkpoint="conformer_us")
        model.log_mels = torch.autocast("cpu", enabled=False)(model.log_mels)
        _cast_inputs_of(model.conv1)
        return SpeechRecognizer(model, VOCABULARY)

    def batches(self, seed: int) -> Iterator[Any]:
        return _without_end(_set_up(AccentsDataModule(kept=(), seed=seed)).train_dataloader(), seed)

    def loss(self, module: Any, batch: Any) -> Tensor:
        return module.batch_loss(batch)

    def evaluate(self, module: Any) -> tuple[float, float]:
        losses, heard = [], []
        for batch in self._validation:
            texts, loss = module.predict_and_loss(batch)
            losses.append(loss.item() * len(texts))
            rows = zip(batch.ids, batch.accents, batch.speakers, batch.texts, texts, strict=True)
            heard += [Transcript(*row) for row in rows]
        return sum(losses) / len(heard), 100 * error_rate(heard)[0]


TASKS: dict[str, type[Task]] = {"digits": Digits, "accents": Accents}


def _set_up(data: Any) -> Any:
    data.setup()
    return data


def _cast_inputs_of(layer: nn.Module) -> None:
    """To the dtype of its bias, which is that of the activations."""
    layer.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.bias.dtype),))


def _without_end(loader: Any, seed: int) -> Iterator[Any]:
    """Epoch after epoch; torch is seeded anew before each batch is used."""
    epoch, step = 0, 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            torch.manual_seed(10_000 * seed + step)
            yield batch
            step += 1
        epoch += 1


def adapted(task: Task, base: torch.dtype, dtype: torch.dtype, seed: int, heads: bool) -> Any:
    """The task's module with updates.

    Args:
        base: what the frozen weights are rounded to.
        dtype: what they are stored in, and with them the activations.
        seed: of A.
        heads: train also what the recipe trains beside the updates.
    """
    module: Any = task.module()
    torch.manual_seed(seed)
    ll.inject(module.model, ll.LoRAConfig(**task.lora))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (heads or "lora_" in name))
    for layer in [m for m in module.modules() if not isinstance(m, NORMS)]:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if "lora_" in name:
                continue
            if parameter.requires_grad:
                parametrize.register_parametrization(layer, name, _Rounded(dtype), unsafe=True)
            else:
                parameter.data = parameter.to(base).to(dtype)
    return module


class _Rounded(nn.Module):
    """A weight that trains in float32, in the dtype that it is used in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)
