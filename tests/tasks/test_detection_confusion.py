"""What a detector takes for what, counted by hand."""

import torch

from lora_lightning.tasks.average_precision import AveragePrecision
from lora_lightning.tasks.detection_confusion import detections_of, taken_for

NAMES = ["disc", "box"]


def picture(boxes, labels, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), **more}


def test_objects_are_taken_for_classes_and_for_nothing():
    precision = AveragePrecision()
    there = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 90, 30]]
    truth = picture(there, [1, 1, 2, 1], iscrowd=torch.tensor([0, 0, 0, 1]))
    said = [
        ([0, 0, 10, 9], 2, 0.95),  # on the first disc, but a surer box leaves it to the disc's own prediction
        ([0, 0, 10, 10], 1, 0.9),  # right
        ([20, 0, 30, 9], 2, 0.8),  # a disc taken for a box
        ([60, 60, 70, 70], 1, 0.7),  # a disc where nothing is
        ([62, 2, 80, 20], 1, 0.6),  # on a crowd
        ([40, 0, 50, 10], 2, 0.4),  # not sure enough: the box is missed
    ]
    boxes, labels, scores = map(list, zip(*said, strict=True))
    precision.update([picture(boxes, labels, scores=torch.tensor(scores))], [truth])
    precision.compute()
    assert taken_for(precision, 2, 0.5).tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    assert taken_for(precision, 2, 0.4).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0]]


def test_images_without_objects_or_predictions():
    precision = AveragePrecision(per_class=True)
    nothing, none = picture([], []), picture([], [], scores=torch.zeros(0))
    disc = picture([[0, 0, 10, 10]], [1])
    precision.update([none, {**disc, "scores": torch.ones(1)}, none], [nothing, nothing, disc])
    found = detections_of(precision, NAMES, 0.5)
    assert found.taken_for.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert found.scores["map"] == 0 and precision.images == [], "reset"
