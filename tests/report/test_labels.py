"""Labels of boxes: none covers another, each lies in the picture and touches its box."""

import random

import pytest

from lora_lightning.report.labels import placed


def overlap(one, other):
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide > 1e-9 and high > 1e-9


def crowd(seed):
    """Boxes of all sizes, many of them alike and some beyond the picture's edges, and their labels."""
    draw = random.Random(seed)
    width, height = draw.uniform(60, 300), draw.uniform(60, 300)
    boxes = []
    for _ in range(draw.randint(1, 40)):
        if boxes and draw.random() < 0.4:
            boxes.append([v + draw.uniform(-3, 3) for v in draw.choice(boxes)])
            continue
        x, y = draw.uniform(-5, width), draw.uniform(-5, height)
        boxes.append([x, y, x + draw.uniform(0, width - x + 5), y + draw.uniform(0, height - y + 5)])
    sizes = [(draw.uniform(20, 80), draw.uniform(10, 16)) for _ in boxes]
    return boxes, sizes, width, height


@pytest.mark.parametrize("seed", range(40))
def test_labels_never_cover_each_other(seed):
    boxes, sizes, width, height = crowd(seed)
    places = placed(boxes, sizes, width, height)
    shown = [p for p in places if p is not None]
    assert not any(overlap(p, q) for i, p in enumerate(shown) for q in shown[:i])
    for place, box, size in zip(places, boxes, sizes, strict=True):
        if place is None:
            continue
        left, top, right, bottom = place
        assert (right - left, bottom - top) == pytest.approx(size)
        assert left >= 0 and top >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
        near = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        assert overlap(place, near), "a label belongs to its box"


def test_the_first_labels_stay_when_more_boxes_are_shown():
    boxes, sizes, width, height = crowd(3)
    everything = placed(boxes, sizes, width, height)
    for count in range(len(boxes)):
        assert placed(boxes[:count], sizes[:count], width, height) == everything[:count]


def test_a_label_alone_stands_on_its_box_and_within_the_picture():
    assert placed([[20, 30, 60, 70]], [(30, 10)], 100, 100) == [(20, 20, 50, 30)]
    assert placed([[80, 0, 100, 20]], [(30, 10)], 100, 100) == [(70, 0, 100, 10)]
    assert placed([[0, 0, 9, 9]], [(30, 10)], 20, 100) == [None], "wider than the picture"


def test_two_boxes_at_one_place_have_both_labels():
    """As `disc 0.42` and `star 0.44` of one object."""
    places = placed([[20, 30, 60, 70]] * 2, [(50, 12)] * 2, 200, 200)
    assert None not in places and not overlap(*places)
