"""Targets of other data in a model's own numbers."""

import pytest
import torch

from lora_lightning.data.relabelled import Relabelled, by_name
from lora_lightning.errors import UserError


def test_classes_are_matched_by_name():
    assert by_name(["dog", "cat"], ["ant", "cat", "dog"]) == [2, 1]
    assert by_name(["dog", "N/A", "N/A"], ["cat", "dog"], ["N/A"]) == [1, 0, 0]
    with pytest.raises(UserError, match=r"'dgo', 'x'.*Did you mean 'dog'.*Its classes: cat, dog"):
        by_name(["dgo", "x", "cat"], ["cat", "dog"])


def test_targets_of_every_kind_are_renumbered():
    images = torch.zeros(2, 3, 4, 4)
    mask = torch.tensor([[[0, 1], [255, 2]]] * 2)
    several = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    boxes = [{"labels": torch.tensor([1, 3]), "boxes": torch.ones(2, 4)}] * 2
    batches = [(images, t) for t in (torch.tensor([0, 2]), mask, several, boxes)]
    loader = Relabelled([*batches, (images, torch.tensor([1, 1]), "weights")], [3, 0, 1], 4)
    (_, one), (_, pixels), (_, many), (_, found), (_, last, weights) = list(loader)
    assert len(loader) == 5 and one.tolist() == [3, 1] and (last.tolist(), weights) == ([0, 0], "weights")
    assert pixels[0].tolist() == [[3, 0], [255, 1]]
    assert many.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert found[0]["labels"].tolist() == [4, 2] and found[0]["boxes"].shape == (2, 4)
    ((_, masks, places),) = Relabelled([([images[0]], list(mask), [7])], [3, 0, 1], 4)
    assert [one.tolist() for one in masks] == [[[3, 0], [255, 1]]] * 2 and places == [7]
    assert boxes[0]["labels"].tolist() == [1, 3]  # the data's own stay
