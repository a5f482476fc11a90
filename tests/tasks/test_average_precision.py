"""COCO's scores checked against pycocotools and faster-coco-eval themselves, on frozen predictions."""

from __future__ import annotations

import contextlib
import io

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
from pycocotools import mask as rle

from lora_lightning.app.predict_detection import coco_results
from lora_lightning.tasks.average_precision import AveragePrecision, scores_of
from tests.tasks.frozen_detections import CLASSES, HEIGHT, WIDTH, frozen

NAMES = [f"class {n}" for n in range(1, CLASSES + 1)]
NUMBERS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
LIBRARIES = {
    "pycocotools": (pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval),
    "faster-coco-eval": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
}


def coco_files():
    """The frozen set as COCO's annotations and results; the results are those that `predict` writes."""
    targets, predictions = frozen()
    images = [{"id": n, "width": WIDTH, "height": HEIGHT} for n in range(len(targets))]
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)]
    annotations, results = [], []
    for n, (target, found) in enumerate(zip(targets, predictions)):
        columns = (target[k].tolist() for k in ("boxes", "labels", "iscrowd", "area"))
        for (x1, y1, x2, y2), label, crowd, area, mask in zip(*columns, target["masks"]):
            coded = rle.encode(np.asfortranarray(mask.byte().numpy()))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": n, "category_id": label, "area": area,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": crowd,
                    "segmentation": {"size": coded["size"], "counts": coded["counts"].decode()},
                }
            )  # fmt: skip
        results += coco_results(found, n, range(1, CLASSES + 1))
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}, results


def scored(library: str, kind: str, category: int | None = None) -> dict[str, float]:
    coco, evaluation = LIBRARIES[library]
    truth, results = coco_files()
    if kind == "segm":  # loadRes measures an object by its box where it has one
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        whole = coco()
        whole.dataset = truth
        whole.createIndex()
        run = evaluation(whole, whole.loadRes(results), kind)
        if category is not None:
            run.params.catIds = [category]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(NUMBERS, run.stats[:6]))


@pytest.fixture(scope="module")
def ours() -> dict[str, float]:
    targets, predictions = frozen()
    precision = AveragePrecision(masks=True, per_class=True)
    for first in range(0, len(targets), 5):
        precision.update(predictions[first : first + 5], targets[first : first + 5])
    return scores_of(precision.compute(), NAMES)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_every_size_to_a_millionth(library, kind, ours):
    prefix = "mask_" if kind == "segm" else ""
    theirs = scored(library, kind)
    assert 0.1 < theirs["map"] < 0.9
    assert len({round(v, 3) for v in theirs.values()}) == 6  # six different numbers are compared
    for name, value in theirs.items():
        assert ours[prefix + name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_every_class_to_a_millionth(library, kind, ours):
    prefix = "mask_" if kind == "segm" else ""
    for number, name in enumerate(NAMES, 1):
        theirs = scored(library, kind, number)["map"]
        assert ours[f"{prefix}map/{name}"] == pytest.approx(theirs, abs=1e-6), name


def test_crowds_are_ignored_not_missed(ours):
    """Counting them as objects gives another score: the comparison above would see it."""
    targets, predictions = frozen()
    assert sum(int(t["iscrowd"].sum()) for t in targets) >= 5
    precision = AveragePrecision()
    precision.update(predictions, [{k: v for k, v in t.items() if k != "iscrowd"} for t in targets])
    assert abs(float(precision.compute()["map"]) - ours["map"]) > 0.01
