"""Ways to train EfficientNet-Lite0 on Fashion-MNIST, for `benchmarks.real_pictures`: a run of one method."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fits import FrozenStatistics, trainer
from benchmarks.real_files import efficientnet_lite0, fashion
from lora_lightning import LoRACallback, LoRAConfig, UserError, plan
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim_config import OptimConfig

CLASSES, SIZE, BATCH = 10, 112, 50
EPOCHS = {100: 3, 10: 15}  # by pictures a class: 60 and 30 steps
VALIDATION, TEST = 500, 1000  # pictures
LORA: dict[str, Any] = {"fold_norms": True}  # else the defaults
WARMUP = 0.3  # of the steps: networks with frozen BatchNorm bear higher rates so
DEPTHWISE = r".*conv_dw"  # PEFT refuses grouped convolutions unless the rank is a multiple of the groups


@dataclass(frozen=True)
class Method:
    """How the model is trained.

    Attributes:
        label: as the table has it.
        rates: the first rates to try, by the same factor; more beside them where the best is at an edge.
        rank: of the updates, 0 without.
    """

    label: str
    rates: tuple[float, ...]
    rank: int = 0


METHODS = {
    "probe": Method("linear probe", (3e-3, 1e-2, 3e-2)),
    "lora_8": Method("LoRA, r = 8", (1e-3, 3e-3, 1e-2), 8),
    "full": Method("full fine-tuning", (1e-3, 3e-3, 1e-2)),
    "peft_8": Method("PEFT, r = 8", (1e-3, 3e-3, 1e-2), 8),
    "lora_2": Method("LoRA, r = 2", (1e-3, 3e-3, 1e-2), 2),
    "lora_4": Method("LoRA, r = 4", (1e-3, 3e-3, 1e-2), 4),
    "lora_16": Method("LoRA, r = 16", (1e-3, 3e-3, 1e-2), 16),
    "bitfit": Method("BitFit", (3e-3, 1e-2, 3e-2)),
    "full_frozen": Method("full fine-tuning, BatchNorm frozen", (3e-4, 1e-3, 3e-3)),
    "peft_8_frozen": Method("PEFT, r = 8, BatchNorm frozen", (1e-3, 3e-3, 1e-2), 8),
}


class Batches:
    """Batches of one set, as long as they are asked for.

    Args:
        views: (v, n, ...): each picture, and with v = 2 it mirrored.
        labels: (n,).
        shuffle: draw the order and the view, by torch's own numbers; else every first view in its order.
    """

    def __init__(self, views: Tensor, labels: Tensor, shuffle: bool = False) -> None:
        self.views, self.labels, self.shuffle = views, labels, shuffle

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        view = (
            torch.randint(len(self.views), (count,)) if self.shuffle else torch.zeros(count, dtype=torch.long)
        )
        for chosen in order.split(BATCH):
            yield prepared(self.views[view[chosen], chosen]), self.labels[chosen]


def prepared(images: Tensor) -> Tensor:
    """Grey pictures (n, 28, 28) of uint8 as the network has them, (n, 3, 112, 112); features as they are."""
    if images.dtype != torch.uint8:
        return images
    large = F.interpolate(images[:, None].float(), size=(SIZE, SIZE), mode="bicubic").clamp(0, 255)
    normal = (large / 127.5 - 1).expand(-1, 3, -1, -1)
    return normal.contiguous(memory_format=torch.channels_last)


@lru_cache
def sets(shots: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Views and labels of "train", which has two, "val" and "test": the same pictures for every run."""
    images, labels = fashion("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = [order[labels[order] == c] for c in range(CLASSES)]
    train = torch.cat([of[:shots] for of in by_class])
    val = torch.cat([of[1000 : 1000 + VALIDATION // CLASSES] for of in by_class])
    tested, test_labels = fashion("t10k")
    parts = {
        "train": (images[train], labels[train]),
        "val": (images[val], labels[val]),
        "test": (tested[:TEST], test_labels[:TEST]),
    }
    views = {name: [x, x.flip(-1)] if name == "train" else [x] for name, (x, _) in parts.items()}
    return {name: (torch.stack(views[name]), y) for name, (_, y) in parts.items()}


@lru_cache
def features(shots: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The same sets as what the frozen network makes of them, for a probe."""
    model = efficientnet_lite0(CLASSES).to(memory_format=torch.channels_last).eval()
    model.reset_classifier(0)
    return {
        name: (torch.stack([_outputs(model, view) for view in views]), y)
        for name, (views, y) in sets(shots).items()
    }


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(prepared(part)) for part in images.split(100)])


def run(
    shots: int, method: str, lr: float, seed: int
) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Train, and validate after the last epoch.

    Returns:
        What was measured, accuracies in percent; and what tests the trained model, when it is called.
    """
    L.seed_everything(seed, verbose=False)
    data = features(shots) if method == "probe" else sets(shots)
    task, callbacks = prepare(method, lr)
    epochs = EPOCHS[shots]
    fitter = trainer(callbacks=callbacks, max_epochs=epochs, check_val_every_n_epoch=epochs)
    start = time.process_time()
    stopped = ""
    try:
        fitter.fit(task, Batches(*data["train"], shuffle=True))
    except UserError as error:  # the run collapsed
        stopped = str(error)
    found = {
        "shots": shots,
        "method": method,
        "lr": lr,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - start, 1),
        "val": accuracy(task.model, data["val"]),
        "trained": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "stopped": stopped,
    }

    def test() -> dict[str, float]:
        tested = {"test": accuracy(task.model, data["test"])}
        if method.startswith("peft"):
            tested["reloaded"] = accuracy(reloaded(task.model), data["test"])
        return tested

    return found, test


def prepare(method: str, lr: float) -> tuple[ImageClassifier, list[L.Callback]]:
    """The task with a fresh head, and the callbacks of its Trainer."""
    network = efficientnet_lite0(CLASSES).to(memory_format=torch.channels_last)
    callbacks: list[L.Callback] = []
    optim, rank = OptimConfig(lr=lr, schedule={"warmup": WARMUP}), METHODS[method].rank
    if method.endswith("frozen"):
        callbacks.append(FrozenStatistics())
    if method == "probe":
        network = nn.Linear(network.num_features, CLASSES)
    elif method.startswith("lora"):
        callbacks = [LoRACallback(LoRAConfig(rank=rank, **LORA), verbose=False)]
    elif method.startswith("peft"):
        network = peft_model(network, rank)
    elif method == "bitfit":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return ImageClassifier(network, CLASSES, optim=optim), callbacks


def peft_model(network: nn.Module, rank: int) -> Any:
    """PEFT with the layers that LoRA has here, but for the depthwise ones, which it cannot have."""
    from peft import LoraConfig, get_peft_model

    layers = plan(network, LoRAConfig(rank=rank, exclude_modules=DEPTHWISE)).layers
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="|".join(re.escape(layer.name) for layer in layers),
        modules_to_save=["classifier"],
    )
    wrapped: Any = get_peft_model(network, config)
    wrapped.num_classes = CLASSES
    return wrapped


def reloaded(wrapped: Any) -> nn.Module:
    """PEFT's saved adapter in a fresh model, as whoever gets the file has it."""
    import tempfile

    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        fresh = efficientnet_lite0(CLASSES).to(memory_format=torch.channels_last)
        return PeftModel.from_pretrained(fresh, folder)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """In percent, of the pictures as they are."""
    model.eval()
    right = (_outputs(model, data[0][0]).argmax(1) == data[1]).sum().item()
    return round(100 * right / len(data[1]), 2)


def before() -> float:
    """Test accuracy in percent with a fresh head."""
    L.seed_everything(0, verbose=False)
    return accuracy(efficientnet_lite0(CLASSES).to(memory_format=torch.channels_last), sets(100)["test"])
