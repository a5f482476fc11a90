"""Augmentation of boxes and masks, batches of like shape, and an order that a resumed run finds again."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import masks_to_boxes

from lora_lightning.data.coco import CocoFormatDataModule
from lora_lightning.data.detection_transforms import PRESETS, DetectionTransform
from lora_lightning.data.grouped import GroupedOrder, aspect_groups
from tests.data.detection_sets import coco_content, write_coco

RANDOM = sorted(set(PRESETS) - {"none"})


def scene(boxes: list[list[int]], height: int = 120, width: int = 160):
    """A black image on which each box is filled with its label's grey, and its target with masks."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = 100 + 50 * n
        masks[n, y1:y2, x1:x2] = 1
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(1, len(boxes) + 1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "area": torch.zeros(len(boxes)),
        "image_id": torch.tensor(7),
        "masks": masks,
    }
    return image, target


@pytest.mark.parametrize("preset", RANDOM)
def test_boxes_masks_and_pictures_move_together(preset):
    """The mask of each object is still its box, and the picture is bright just there."""
    transform = DetectionTransform(preset)
    changed = 0
    for seed in range(12):
        torch.manual_seed(seed)
        image, before = scene([[20, 30, 80, 90], [100, 10, 150, 60]])
        out, target = transform(image, before)
        assert type(out) is type(target["boxes"]) is type(target["masks"]) is torch.Tensor
        assert out.dtype == torch.uint8
        assert target["image_id"] == 7
        boxes = target["boxes"]
        count = len(boxes)
        assert all(len(target[k]) == count for k in ("labels", "iscrowd", "area", "masks"))
        assert target["masks"].shape[1:] == out.shape[1:]
        assert bool((boxes >= 0).all())
        assert bool((boxes[:, 2] <= out.shape[2]).all() and (boxes[:, 3] <= out.shape[1]).all())
        sides = boxes[:, 2:] - boxes[:, :2]
        assert bool((sides >= 1).all())
        torch.testing.assert_close(target["area"], sides.prod(1))
        large = sides.amin(1) > 8
        if large.any():
            measured = masks_to_boxes(target["masks"][large])
            measured[:, 2:] += 1
            assert float((measured - boxes[large]).abs().max()) <= 1.5
            if preset not in ("photometric", "ssd"):
                for mask in target["masks"][large]:
                    assert out[0][mask.bool()].float().mean() > 80
        changed += out.shape != image.shape or not torch.equal(out, image)
    assert changed >= 4


@pytest.mark.parametrize("preset", RANDOM)
def test_an_empty_image_stays_empty(preset):
    for seed in range(5):
        torch.manual_seed(seed)
        image, target = scene([])
        out, after = DetectionTransform(preset)(image, target)
        assert after["boxes"].shape == (0, 4)
        assert after["masks"].shape == (0, *out.shape[1:])


def test_scale_jitter_and_iou_crop_lose_objects_with_all_that_is_theirs():
    lost = 0
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = scene([[0, 0, 20, 20], [140, 100, 160, 120]])
        _, after = DetectionTransform("iou_crop")(image, target)
        lost += len(after["labels"]) < 2
        assert set(after["labels"].tolist()) <= {1, 2}
    assert lost


def test_no_augmentation_changes_nothing():
    image, target = scene([[20, 30, 80, 90]])
    out, after = DetectionTransform("none")(image, target)
    assert out is image
    assert after == target


def test_groups_by_shape():
    sizes = [(640, 480), (480, 640), (640, 427), (100, 100), (2000, 500), (500, 2000)]
    groups = aspect_groups(sizes)
    assert groups[0] == groups[2]
    assert groups[5] < groups[1] < groups[3] <= groups[0] < groups[4]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_hold_one_group_and_every_sample_once(count, monkeypatch):
    groups = [0] * 37 + [1] * 51 + [2] * 5
    monkeypatch.setattr("lora_lightning.data.grouped.processes", lambda: (0, count))
    order = list(GroupedOrder(groups, 4))
    assert sorted(order) == list(range(93))
    mixed = 0
    for rank in range(count):
        mine = order[rank::count]
        batches = [mine[i : i + 4] for i in range(0, len(mine), 4)]
        mixed += sum(len({groups[i] for i in batch}) > 1 for batch in batches)
    assert mixed <= 3 * count
    assert order != list(GroupedOrder(groups, 4))


def module(folder, **options) -> CocoFormatDataModule:
    for part, first in (("train", 0), ("val", 50)):
        write_coco(folder / part, folder / f"{part}.json", coco_content(14, first))
    files = [str(folder / name) for name in ("train", "train.json", "val", "val.json")]
    return CocoFormatDataModule(*files, **{"num_workers": 0, "batch_size": 3, "augment": "ssd", **options})


def same(a, b) -> bool:
    images = all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    keys = ("image_id", "boxes", "labels")
    return images and all(torch.equal(x[k], y[k]) for x, y in zip(a[1], b[1], strict=True) for k in keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(tmp_path, workers):
    """Order and augmentation, in this process or in workers, from any batch on."""
    whole = module(tmp_path).train_dataloader()
    whole.sampler.set_epoch(3)
    batches = list(whole)
    assert len(batches) == len(whole) == 5
    seen = [int(t["image_id"]) for batch in batches for t in batch[1]]
    assert sorted(seen) == [100 + n for n in range(14)]
    other = module(tmp_path, num_workers=workers).train_dataloader()
    other.sampler.set_epoch(3)
    other.load_state_dict({"batch": 2})
    rest = list(other)
    assert len(rest) == 3
    assert all(same(a, b) for a, b in zip(rest, batches[2:], strict=True))
    whole.sampler.set_epoch(4)
    assert [int(t["image_id"]) for batch in whole for t in batch[1]] != seen


def test_batches_of_landscapes_and_of_portraits(tmp_path):
    loader = module(tmp_path, augment="none", batch_size=2).train_dataloader()
    mixed = sum(len({tuple(i.shape) for i in images}) > 1 for images, _ in loader)
    assert mixed <= 1
