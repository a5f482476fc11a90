"""`lora-lightning predict` with a classifier: the classes of pictures, or a number for each, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning.app.contact_sheet import SHOWN, write_sheet
from lora_lightning.app.prediction_files import WRITERS, Row, problems_of_file, write_rows
from lora_lightning.app.trained import Trained
from lora_lightning.data.picture_files import PictureFiles, columns, problems_of_pictures
from lora_lightning.data.picture_transform import FACTS as PREPROCESSING
from lora_lightning.data.picture_transform import evaluation_transform, preprocessing_of
from lora_lightning.data.workers import loading_workers
from lora_lightning.tasks.tellers import Teller, teller_of
from lora_lightning.utils.plurals import counted
from lora_lightning.utils.progress import Bar
from lora_lightning.utils.tables import printable, truncate_list

BATCH = 32
SHEETS = (".png", ".jpg", ".jpeg")


def problems(options: Mapping[str, Any], trained: Trained) -> list[str]:
    """What is wrong with the options, one line each, before anything is built."""
    overwrite = bool(options.get("overwrite"))
    found = problems_of_file("out", Path(options["out"]), tuple(WRITERS), overwrite)
    if "sheet" in options:
        found += problems_of_file("sheet", _sheet(options), SHEETS, overwrite)
    target = (trained.facts or {}).get("target", "class")
    if "top" in options and target != "class":
        found.append(f"top={options['top']}: this model does not choose one class; leave it out.")
    if "threshold" in options and target != "classes":
        found.append(f"threshold={options['threshold']:g}: a picture has one prediction here; leave it out.")
    return found + problems_of_pictures(options.get("images"))


def predict(options: Mapping[str, Any], trained: Trained) -> str:
    """Predict each picture of a folder, or one, and write a row for each.

    Args:
        options: of the command `predict`, by name.

    Returns:
        What was done, in a few lines.
    """
    model, facts = trained.model(options.get("check_base", True))
    teller = teller_of(facts, options)
    pictures = PictureFiles(options["images"], evaluation_transform(preprocessing_for(model, facts, trained)))
    flips = options.get("flips", trained.config["task"].get("test_flips", False))
    classifier = Classifier(model, trained, flips)
    data = trained.config.get("data") or {}
    workers = options.get("num_workers", data.get("num_workers"))
    loader = DataLoader(
        pictures,
        options.get("batch_size", data.get("batch_size", BATCH)),
        num_workers=0 if len(pictures) == 1 else loading_workers(workers, None),
        collate_fn=columns,
    )
    rows: list[Row] = [{}] * len(pictures)
    with Bar("predicting", len(pictures), "pictures") as bar:
        for indices, images, bad in loader:
            told = teller.rows(classifier(images)) if indices else []
            for index, row in [*zip(indices, told, strict=True), *((i, {"error": why}) for i, why in bad)]:
                rows[index] = {"path": pictures.names[index], **row}
            bar.advance(len(indices) + len(bad))
    out = Path(options["out"])
    write_rows(out, ["path", *teller.columns, "error"], rows)
    lines = [*_summary(rows, teller), f"{out}: a row for each, {', '.join(teller.columns[:4])}, …"]
    if "sheet" in options:
        pairs = zip(pictures.files, rows, strict=True)
        shown = [(file, *(("", "") if "error" in row else teller.caption(row))) for file, row in pairs]
        write_sheet(_sheet(options), shown[:SHOWN], pictures.names)
        first = f"the first {SHOWN}" if len(shown) > SHOWN else "all of them"
        lines.append(f"{_sheet(options)}: {first} in one picture")
    return printable("\n".join(lines))


class Classifier:
    """A model on its device: normalized images -> outputs (n, classes) on the CPU, float32.

    Args:
        flips: the mean over each picture and its mirror image.
    """

    def __init__(self, model: nn.Module, trained: Trained, flips: bool) -> None:
        self.fabric, self.flips = trained.fabric(), flips
        self.model = model.to(self.fabric.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.fabric.device)
        with self.fabric.autocast():
            outputs: Tensor = self.model(images)
            if self.flips:
                outputs = (outputs + self.model(images.flip(-1))) / 2
        return outputs.float().cpu()


def preprocessing_for(model: nn.Module, facts: Mapping[str, Any], trained: Trained) -> Mapping[str, Any]:
    """As it came with what was trained; else the model's own, as its data would take it."""
    if set(PREPROCESSING) <= facts.keys():
        return facts
    data = trained.config.get("data") or {}
    return preprocessing_of(model, data.get("image_size"), data.get("crop_pct"))


def _summary(rows: Sequence[Row], teller: Teller) -> list[str]:
    """How many pictures, of which classes, and which cannot be read."""
    bad = [row for row in rows if "error" in row]
    good = [row for row in rows if "error" not in row]
    lines = [f"{counted(len(good), 'picture')} predicted"]
    if counts := Counter(name for row in good for name in teller.counted(row)):
        lines[0] += f": {truncate_list([f'{name} {n}' for name, n in counts.most_common()], most=8)}"
    if bad:
        lines.append(f"{len(bad)} cannot be read: {truncate_list([row['path'] for row in bad])}")
    return lines


def _sheet(options: Mapping[str, Any]) -> Path:
    return Path(options["sheet"]).expanduser()
