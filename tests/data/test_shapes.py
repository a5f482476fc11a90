"""The drawn shapes: the same pictures for ever, boxes that fit, and two domains that differ."""

import hashlib

import pytest
import torch
from lightning import seed_everything

from lora_lightning.data.drawing import CLASSES, DISTANCES, LEAST_VISIBLE, draw
from lora_lightning.data.shapes import Shapes, ShapesDataModule
from lora_lightning.errors import ConfigError


def test_a_picture_is_a_function_of_its_index():
    first, again = Shapes("target", "val", 5, 96), Shapes("target", "val", 9, 96)
    seed_everything(1, verbose=False)
    for i in (3, 1, 4):
        (a, truth), (b, same) = first[i], again[i]
        assert torch.equal(a, b) and torch.equal(truth["boxes"], same["boxes"]) and truth["image_id"] == i
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], Shapes("target", "test", 5, 96)[0][0])


@pytest.mark.parametrize("domain", ["source", "target"])
def test_boxes_and_labels_never_change(domain):
    """The shipped weights and the published tables hang on them. Pixels are left to the machine's sines."""
    digest = hashlib.sha256()
    for i in range(20):
        _, boxes, labels = draw(domain, 128, (0, 0, i))
        digest.update(boxes.round().to(torch.int16).numpy().tobytes() + labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == {"source": "78e505d58f4d7c28", "target": "fae1194398e8ba1a"}[domain]


@pytest.mark.parametrize("domain", ["source", "target"])
def test_boxes_are_inside_the_picture_and_hold_something(domain):
    seen = set()
    for i in range(60):
        pixels, boxes, labels = draw(domain, 128, (7, i))
        assert pixels.shape == (3, 128, 128) and pixels.dtype == torch.uint8
        assert 1 <= len(boxes) == len(labels) <= 6
        assert (boxes >= 0).all() and (boxes <= 128).all()
        sizes = boxes[:, 2:] - boxes[:, :2]
        assert (sizes >= 6).all() and (sizes <= 50).all()
        seen |= set(labels.tolist())
    assert seen == ({1, 2, 3} if domain == "source" else {1, 2, 3, 4}), "the new class is in the target alone"


def test_a_box_touches_its_shape_on_every_side():
    """In the source domain a lone shape differs from the even ground exactly within its box."""
    lone = 0
    for i in range(40):
        pixels, boxes, _ = draw("source", 128, (8, i))
        if len(boxes) == 1:
            lone += 1
            shape = (pixels.float() - pixels[:, :1, :1].float()).abs().sum(0) > 90  # half covered, and more
            ys, xs = torch.where(shape)
            found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (found - boxes[0]).abs().max() <= 1
    assert lone >= 3


@pytest.mark.parametrize("name", CLASSES)
def test_distances_are_negative_inside_and_grow_by_the_way_gone(name):
    import numpy as np

    u, v = np.meshgrid(np.linspace(-20, 20, 81), np.linspace(-20, 20, 81))
    distance = DISTANCES[name](u, v, 10.0)
    assert distance[40, 40] < 0 < distance[0, 0]
    assert abs(np.diff(distance, axis=0)).max() <= 0.5 + 1e-6, "no steeper than the way between two pixels"
    assert np.hypot(u, v)[distance < 0].max() <= 0.8 * 10 * 2**0.5, "within the radius, or a square's corner"


def test_what_stands_behind_is_still_half_seen():
    assert LEAST_VISIBLE == 0.5
    overlaps = 0
    for i in range(60):
        _, boxes, _ = draw("target", 128, (9, i))
        for a, b in torch.combinations(torch.arange(len(boxes))).tolist() if len(boxes) > 1 else ():
            low, high = torch.maximum(boxes[a, :2], boxes[b, :2]), torch.minimum(boxes[a, 2:], boxes[b, 2:])
            overlaps += bool((high > low).all())
    assert overlaps > 20


def test_flipping_turns_boxes_with_the_picture():
    plain, flipping = Shapes("source", "train", 1, 64), Shapes("source", "train", 1, 64, flip=True)
    image, truth = plain[0]
    torch.manual_seed(0)
    both = [flipping[0] for _ in range(20)]
    turned = [(i, t) for i, t in both if not torch.equal(i, image)]
    assert 0 < len(turned) < 20
    for other, target in turned:
        assert torch.equal(other.flip(2), image)
        x1, y1, x2, y2 = truth["boxes"].unbind(1)
        assert torch.equal(target["boxes"], torch.stack((64 - x2, y1, 64 - x1, y2), 1))
    assert torch.equal(plain[0][1]["boxes"], truth["boxes"]), "the kept picture is not touched"


def test_batches_are_lists_and_every_loader_has_its_own_pictures():
    data = ShapesDataModule(train_size=5, val_size=3, test_size=2, batch_size=4, side=64)
    images, targets = next(iter(data.train_dataloader()))
    assert [i.shape for i in images] == [(3, 64, 64)] * 4 and all(
        0 <= i.min() <= i.max() <= 1 for i in images
    )
    assert {"boxes", "labels", "image_id"} == set(targets[0])
    assert len(data.train_dataloader()) == 2
    assert sum(len(i) for i, _ in data.val_dataloader()) == 3
    assert data.provides["num_classes"] == len(data.provides["class_names"]) == 4


def test_every_bad_option_is_named():
    with pytest.raises(ConfigError) as caught:
        ShapesDataModule(domain="targt", train_size=0, side=16, batch_size=True)
    message = str(caught.value)
    assert "Did you mean 'target'" in message
    assert all(f"{name}=" in message for name in ("domain", "train_size", "side", "batch_size"))
