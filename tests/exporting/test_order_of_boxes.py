"""A file's boxes whose scores are the same but for rounding are right in any order."""

import pytest
import torch

from lora_lightning.errors import UserError
from lora_lightning.exporting.checks import compare

BOXES = torch.tensor([[0.0, 0, 9, 9], [3, 3, 40, 40], [1, 1, 5, 5]])
LABELS = torch.tensor([1, 2, 1])


def difference(order: list[int], scores: list[float], **changed: torch.Tensor) -> float:
    """Of a file that gives these boxes in another order."""
    found = {"boxes": BOXES, "labels": LABELS, "scores": torch.tensor(scores), "masks": BOXES[:, :, None] > 4}
    given = {**found, **changed}

    def run(_inputs):
        return [tensor[order].numpy() for tensor in given.values()]

    return compare(run, [({}, list(found.values()))], "file", boxes=True)


def test_of_scores_that_rounding_sets_apart_either_is_first():
    assert difference([1, 0, 2], [0.5, 0.5 - 1e-7, 0.3]) < 1e-6
    assert difference([2, 1, 0], [0.5, 0.5, 0.5]) == 0
    assert difference([0, 1, 2], [0.5, 0.4, 0.3]) == 0


def test_no_boxes_are_no_boxes():
    none = [BOXES[:0], LABELS[:0], torch.zeros(0)]
    assert compare(lambda _: [tensor.numpy() for tensor in none], [({}, none)], "file", boxes=True) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": [1, 0, 2], "scores": [0.5, 0.49, 0.3]},
        {"order": [0, 1, 2], "scores": [0.5, 0.5, 0.5], "boxes": BOXES + 1},
        {"order": [1, 0, 2], "scores": [0.5, 0.5, 0.3], "boxes": BOXES[[0, 0, 2]]},
        {"order": [0, 1, 2], "scores": [0.5, 0.5, 0.3], "labels": torch.tensor([2, 2, 1])},
        {"order": [1, 0, 2], "scores": [0.5, 0.5, 0.3], "masks": BOXES[:, :, None] > 2},
    ],
)
def test_what_is_another_detection_is_refused(wrong):
    with pytest.raises(UserError, match="differs from the model"):
        difference(**wrong)


def test_another_number_of_boxes_is_refused():
    with pytest.raises(UserError, match=r"gives \(2, 4\)"):
        difference([0, 1], [0.5, 0.5, 0.5])


def test_of_other_outputs_the_order_counts():
    scores = torch.tensor([0.5, 0.5 - 1e-7, 0.3])
    with pytest.raises(UserError, match="differs from the model"):
        compare(lambda _: [t[[1, 0, 2]].numpy() for t in (BOXES, LABELS, scores)],
                [({}, [BOXES, LABELS, scores])], "file")  # fmt: skip
