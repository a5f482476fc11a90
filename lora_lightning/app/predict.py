"""`lora-lightning predict`: what a trained model says of pictures, in the way of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import get_object

from lora_lightning.app.trained import Trained, named
from lora_lightning.errors import UserError


class Predictor(NamedTuple):
    """A module with `problems(options, trained)` and `predict(options, trained)`, and the options of the
    command that it has beside those of every task."""

    module: str
    options: tuple[str, ...]


# By the class of the task; those derived from it are predicted with alike.
PREDICTORS = {
    "lora_lightning.tasks.classification.ImageClassifier": Predictor(
        "lora_lightning.app.predict_classes", ("top", "threshold", "sheet", "flips")
    ),
    "lora_lightning.tasks.detection.ObjectDetector": Predictor(
        "lora_lightning.app.predict_detection", ("score",)
    ),
    "lora_lightning.tasks.segmentation.SemanticSegmenter": Predictor(
        "lora_lightning.app.predict_masks", ("flips",)
    ),
}


def predict(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Predict what is in pictures.

    Args:
        options: of the command `predict`, by name.
        words: `recipe=NAME key=value …`; none takes the run that the adapter or checkpoint lies in, or what
            came with it.

    Returns:
        What was done, in a few lines.

    Raises:
        UserError: every mistake in one message, before the model is built.
    """
    problems: list[str] = []
    options = {**options, "out": str(Path(options["out"]).expanduser())}
    trained = named(options, words, problems)
    if trained is None:
        raise UserError("\n".join(problems))
    predictor = predictor_of(trained)
    module: Any = import_module(predictor.module)
    problems += _foreign_options(options, predictor)
    problems += module.problems(options, trained)
    if problems:
        raise UserError("\n".join(problems))
    return str(module.predict(options, trained))


def predictor_of(trained: Trained) -> Predictor:
    """Of the task.

    Raises:
        UserError: there is none.
    """
    target = trained.config["task"]["_target_"]
    task = get_object(target)
    for name, predictor in PREDICTORS.items():
        if isinstance(task, type) and issubclass(task, get_object(name)):
            return predictor
    path = trained.source.path if trained.source else "the recipe"
    raise UserError(
        f"{path}: its task, {target}, says nothing of pictures. Use `lora-lightning transcribe` for speech."
    )


def _foreign_options(options: Mapping[str, Any], predictor: Predictor) -> list[str]:
    """Options that only another task has."""
    others = {name for other in PREDICTORS.values() for name in other.options} - {*predictor.options}
    known = ", ".join(predictor.options)
    return [
        f"{name}={options[name]}: is an option of another kind of task: leave it out; this one has {known}."
        for name in options
        if name in others
    ]
