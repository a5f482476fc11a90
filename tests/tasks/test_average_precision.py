"""COCO's scores checked against pycocotools and faster-coco-eval themselves, on frozen predictions."""

from __future__ import annotations

import contextlib
import io

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import torch
from pycocotools import mask as rle

from lora_lightning.app.predict_detection import coco_results
from lora_lightning.tasks import detection_bootstrap
from lora_lightning.tasks.average_precision import AveragePrecision, scores_of
from lora_lightning.tasks.detection_bootstrap import matches_of, means_of, precision_intervals
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


def resampled(order: np.ndarray, **options: bool) -> AveragePrecision:
    """The frozen images in this order, each as an image of its own; no two scores are the same."""
    targets, predictions = frozen()
    precision = AveragePrecision(**options)
    for i, one in enumerate(predictions):
        one["scores"] = one["scores"] + 1e-6 * torch.arange(len(one["scores"])) + 1e-4 * i
    precision.update(
        [predictions[i] for i in order],
        [{k: v for k, v in targets[i].items() if k != "image_id"} for i in order],
    )
    return precision


def test_images_drawn_again_are_scored_as_coco_scores_them(monkeypatch):
    """Crowds among them; each as often as it is drawn, in blocks of any size."""
    count = len(frozen()[0])
    precision = resampled(np.arange(count))
    precision.compute()
    matched = matches_of(precision)
    draws = np.random.default_rng(0).integers(count, size=(3, count))
    counts = np.stack([np.ones(count), *(np.bincount(one, minlength=count) for one in draws)])
    found = means_of(matched, counts.astype(np.float32))
    wanted = [resampled(np.sort(one)).compute() for one in (np.arange(count), *draws)]
    assert found.tolist() == [
        [pytest.approx(float(one[name]), abs=1e-6) for name in ("map", "map_50")] for one in wanted
    ]
    monkeypatch.setattr(detection_bootstrap, "BLOCK", 1)
    assert np.allclose(means_of(matched, counts.astype(np.float32)), found, atol=1e-12)


def test_intervals_of_precision(ours, monkeypatch):
    precision = resampled(np.arange(len(frozen()[0])), masks=True)
    precision.compute()
    found = precision_intervals(precision, 200)
    assert found.keys() == {"map", "map_50"}
    for name, (low, high) in found.items():
        assert low < ours[name] < high and 0.01 < high - low < 0.5
    assert precision_intervals(precision, 200) == found, "the same draws"
    monkeypatch.setattr(detection_bootstrap, "WORK", 100)
    assert precision_intervals(precision) == {}, "of which it would take minutes"
    assert precision_intervals(AveragePrecision()) == {}
