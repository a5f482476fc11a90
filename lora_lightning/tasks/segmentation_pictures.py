"""What a segmentation model found, in pictures: a contact sheet, an HTML page, and W&B's masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor, nn

from lora_lightning.adapters.manage import adapters_off
from lora_lightning.data.mask_files import IGNORED
from lora_lightning.data.mask_pictures import BLACK, Colour, overlay
from lora_lightning.layers.registry import LoRALayer
from lora_lightning.report.page import Section, leave, table, text
from lora_lightning.report.pictures import WIDTH, key, rows_of, sheet
from lora_lightning.tasks.confusion import Confusions, Segmentation, ious

WRONG: Colour = (232, 67, 46)
EXAMINED, SHOWN, ON_SHEET = 200, 12, 6  # test pictures: looked at, on the page by each order, in the sheet
CONFUSED = 10  # pairs of classes on the page
Predict = Callable[[list[Tensor], list[Any]], list[Tensor]]  # pictures, sizes -> maps


@dataclass
class Example:
    """A test picture: its place in the part, its true mask, and the map of each state of the model."""

    place: int
    truth: np.ndarray
    found: dict[str, np.ndarray]


def write_report(
    model: nn.Module,
    predict: Predict,
    data: L.LightningDataModule,
    tested: Segmentation,
    names: Sequence[str],
    colours: Sequence[Colour],
    folder: Path,
) -> list[str]:
    """contact_sheet.png and report.html, and a line about them.

    Args:
        model: what `predict` asks, with the trained weights; if it is adapted, it is also shown as it was
            before.
        data: shows its pictures by `show`, and gives lists of pictures, masks and places.
        tested: of the whole test part, after training.
        names, colours: of the classes.
    """
    examples = list(examined(model, predict, data))
    judged = {state: _judged(examples, state, len(names)) for state in examples[0].found}
    last = list(judged)[-1]
    worst = sorted(examples, key=lambda e: judged[last].picture_miou(e.place))

    def views(example: Example) -> dict[str, Image.Image]:
        picture = data.show("test", example.place)[1]  # type: ignore[attr-defined]  # as MasksDataModule
        return views_of(example, picture, colours)

    lines = [f"{state} training: {_in_words(one)}" for state, one in judged.items()]
    legend = [(_css(colour), name) for name, colour in zip(names, colours, strict=True) if colour != BLACK]
    legend.append((_css(WRONG), "mistakes: another class than the truth"))
    sections = {
        f"The first {min(SHOWN, len(examples))} test pictures": examples[:SHOWN],
        f"Of {len(examples)} test pictures, those with the lowest mIoU after training": worst[:SHOWN],
    }
    rows = [rows_of(title, list(map(views, shown))) for title, shown in sections.items()]
    parts = [*(f"<p>{text(line, 200)}</p>" for line in lines), *_tables(tested, names), key(legend), *rows]
    leave(folder, [Section("Segmentation", "\n".join(parts))], "Segmentation")
    sheet(list(map(views, examples[:ON_SHEET])), legend).save(folder / "contact_sheet.png")
    return [*_classes_in_words(tested, names), ""]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode and without gradients, and afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def examined(model: nn.Module, predict: Predict, data: L.LightningDataModule) -> Iterator[Example]:
    """The first test pictures, as they were seen before (if the model is adapted) and after training."""
    device = next(model.parameters()).device
    adapted = any(isinstance(module, LoRALayer) for module in model.modules())
    data.setup("test")
    count = 0
    with evaluating(model):
        for batch in data.test_dataloader():
            pictures, masks, places = data.on_after_batch_transfer(batch, 0)  # as a Trainer would
            inputs, sizes = [p.to(device) for p in pictures], [mask.shape for mask in masks]
            found = {}
            for state in ("before", "after") if adapted else ("after",):
                with adapters_off(model) if state == "before" else nullcontext():
                    found[state] = predict(inputs, sizes)
            for i, (place, mask) in enumerate(zip(places, masks, strict=True)):
                maps = {state: each[i].cpu().numpy() for state, each in found.items()}
                yield Example(place, mask.numpy(), maps)
            count += len(places)
            if count >= EXAMINED:
                return


def _judged(examples: Sequence[Example], state: str, classes: int) -> Segmentation:
    counted = Confusions(classes)
    for example in examples:
        counted.add(example.place, torch.from_numpy(example.found[state]), torch.from_numpy(example.truth))
    return counted.here()


def _in_words(judged: Segmentation) -> str:
    scores = judged.scores()
    return (
        f"mIoU {100 * scores['miou']:.1f}, {100 * scores['acc']:.1f} % of the pixels right in "
        f"{len(judged.pictures)} pictures"
    )


def _classes_in_words(tested: Segmentation, names: Sequence[str]) -> list[str]:
    """The classes with the lowest intersection over union."""
    each = [
        (value, name)
        for name, value in zip(names, ious(tested.matrix()).tolist(), strict=True)
        if value == value
    ]
    shown = [f"{name} {100 * value:.1f}" for value, name in sorted(each)[:5]]
    return [f"lowest IoU %: {', '.join(shown)}"] if len(each) > 1 else []


def views_of(example: Example, picture: Image.Image, colours: Sequence[Colour]) -> dict[str, Image.Image]:
    """The pictures of one row: the picture, the truth, each state's map, and where the last is wrong."""
    nothing = np.full(example.truth.shape, IGNORED, np.uint8)
    views = {"picture": overlay(picture, nothing, colours, WIDTH)}
    views["truth"] = overlay(picture, example.truth, colours, WIDTH)
    for state, found in example.found.items():
        views[state] = overlay(picture, found, colours, WIDTH)
    wrong = (list(example.found.values())[-1] != example.truth) & (example.truth != IGNORED)
    views["mistakes"] = overlay(
        picture.convert("L").convert("RGB"), wrong.astype(np.uint8), [BLACK, WRONG], WIDTH
    )
    return views


def tables_of(tested: Segmentation, names: Sequence[str]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Header and rows, all numbers fractions, None where there is none: `per_class`, and `confused`, the
    classes that are most often taken for each other."""
    matrix = tested.matrix()
    true, found, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    whole = max(1, int(matrix.sum()))
    with np.errstate(invalid="ignore"):  # of a class that is nowhere
        rates = np.stack([ious(matrix), right / true, right / found, true / whole, found / whole], 1)
    rows = [
        [name, *(None if value != value else value for value in row)]
        for name, row in zip(names, rates.tolist(), strict=True)
    ]
    tables = {"per_class": (["class", "iou", "recall", "precision", "of the pixels", "found on"], rows)}
    if pairs := tested.confused(CONFUSED):
        confused = [[names[t], names[f], count / whole] for t, f, count in pairs]
        tables["confused"] = (["true", "predicted", "of the pixels"], confused)
    return tables


def _tables(tested: Segmentation, names: Sequence[str]) -> list[str]:
    """The same in percent, as HTML."""
    titles = {"per_class": "Classes, over all test pictures", "confused": "Taken for another"}
    parts = []
    for name, (header, rows) in tables_of(tested, names).items():
        words = len([cell for cell in rows[0] if isinstance(cell, str)])
        head = [*header[:words], *(f"{title} %" for title in header[words:])]
        cells = [[*row[:words], *map(_percent, row[words:])] for row in rows]
        parts += [f"<h2>{text(titles[name])}</h2>", table(head, cells, words)]
    return parts


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def log_to_wandb(
    logger: WandbLogger,
    key: str,
    pictures: Sequence[tuple[Image.Image, Tensor, Tensor]],
    names: Sequence[str],
) -> None:
    """Pictures with true and found masks as W&B's own, to be switched on and off there.

    Args:
        pictures: picture, true mask and map (height, width), of any one size.
    """
    labels = {**dict(enumerate(names)), IGNORED: "ignored"}
    masks = [
        {
            kind: {"mask_data": mask.cpu().numpy().astype(np.uint8), "class_labels": labels}
            for kind, mask in (("ground_truth", truth), ("predictions", found))
        }
        for _, truth, found in pictures
    ]
    logger.log_image(key, [picture for picture, _, _ in pictures], masks=masks)
