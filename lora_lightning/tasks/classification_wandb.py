"""What W&B is shown of a tested classifier: its confusion matrix and the worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from lora_lightning.tasks.classification_pictures import MOST, chosen, shown
from lora_lightning.tasks.predictions import Predictions

CLASSES = 50  # of a confusion matrix


def log_to_wandb(logger: WandbLogger, found: Predictions, names: Sequence[str], data: Any) -> None:
    """The confusion matrix under test/confusion, and pictures with truth and prediction under test/mistakes.

    Args:
        data: its `show` gives the pictures; without it there are none.
    """
    if found.target == "class" and found.classes <= CLASSES:
        import wandb

        matrix = wandb.plot.confusion_matrix(
            y_true=found.truths.tolist(),
            preds=found.predicted.tolist(),
            class_names=list(names),
            title="Test pictures",
        )
        logger.experiment.log({"test/confusion": matrix})
    worst = next(iter(chosen(found).values()), [])[:MOST]
    pictures = [(index, *shown(data, index)) for index in worst]
    pairs = [(p, f"{name}: {in_words(found, names, i)}") for i, name, p in pictures if p is not None]
    if pairs:
        images, captions = zip(*pairs, strict=True)
        logger.log_image("test/mistakes", list(images), caption=list(captions))


def in_words(found: Predictions, names: Sequence[str], index: int) -> str:
    """`cat, predicted dog 0.93`"""
    if found.target == "number":
        return f"{float(found.truths[index]):.4g}, predicted {float(found.predicted[index]):.4g}"
    probabilities = found.probabilities_of(index)
    if found.target == "class":
        best = int(found.predicted[index])
        return f"{names[int(found.truths[index])]}, predicted {names[best]} {float(probabilities[best]):.2f}"
    said = [
        f"{names[i]} {float(probabilities[i]):.2f}" for i in found.predicted[index].nonzero()[:, 0].tolist()
    ]
    true = [names[i] for i in found.truths[index].nonzero()[:, 0].tolist()]
    return f"{', '.join(true) or 'none'}, predicted {', '.join(said) or 'none'}"
