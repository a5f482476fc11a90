"""The losses of a classifier against torch's own and plain loops."""

import pytest
import torch
import torch.nn.functional as F

from lora_lightning.tasks.classification_losses import Loss

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(8, 4, generator=GENERATOR)
LABELS = torch.randint(0, 4, (8,), generator=GENERATOR)
SOFT = torch.rand(8, 4, generator=GENERATOR).softmax(1)
SEVERAL = (torch.rand(8, 4, generator=GENERATOR) < 0.4).float()
WEIGHTS = torch.rand(8, generator=GENERATOR) + 0.1
OF_CLASSES = torch.tensor([0.5, 1.0, 2.0, 4.0])


def same(loss, expected):
    torch.testing.assert_close(loss, torch.as_tensor(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_class_is_torchs_cross_entropy(smoothing):
    plain, weighted = (
        Loss(label_smoothing=smoothing),
        Loss(label_smoothing=smoothing, class_weights=OF_CLASSES),
    )
    for targets in (LABELS, SOFT):
        same(plain.train(LOGITS, targets), F.cross_entropy(LOGITS, targets, label_smoothing=smoothing))
    expected = F.cross_entropy(LOGITS, LABELS, OF_CLASSES, label_smoothing=smoothing)
    same(weighted.train(LOGITS, LABELS), expected)
    if not smoothing:  # torch divides soft ones by their number, which makes weights change the rate
        hard = F.one_hot(LABELS, 4).float()
        same(weighted.train(LOGITS, hard), expected)


def test_a_weight_of_two_is_the_picture_twice():
    rows = F.cross_entropy(LOGITS, LABELS, reduction="none")
    same(Loss().train(LOGITS, LABELS, WEIGHTS), (rows * WEIGHTS).sum() / WEIGHTS.sum())
    double = torch.ones(8)
    double[3] = 2
    for loss, targets in (
        (Loss(), LABELS),
        (Loss("classes"), SEVERAL),
        (Loss(class_weights=OF_CLASSES), LABELS),
    ):
        twice = torch.cat([torch.arange(8), torch.tensor([3])])
        same(loss.train(LOGITS, targets, double), loss.train(LOGITS[twice], targets[twice]))
        same(loss.train(LOGITS, targets, torch.full((8,), 7.0)), loss.train(LOGITS, targets))
    assert Loss().train(LOGITS, LABELS, torch.zeros(8)) == 0  # and no NaN


def test_logits_are_adjusted_in_training_alone():
    shares = torch.tensor([0.7, 0.2, 0.05, 0.05])
    loss = Loss(logit_adjustment=shares.log())
    same(loss.train(LOGITS, LABELS), F.cross_entropy(LOGITS + shares.log(), LABELS))
    same(loss.plain(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))
    # Menon et al. 2020, equation 11, written out for one picture.
    z, y = LOGITS[0].exp() * shares, LABELS[0]
    same(loss.train(LOGITS[:1], LABELS[:1]), (1 + (z.sum() - z[y]) / z[y]).log())


def test_several_classes_are_torchs_binary_cross_entropy():
    same(Loss("classes").train(LOGITS, SEVERAL), F.binary_cross_entropy_with_logits(LOGITS, SEVERAL))
    expected = F.binary_cross_entropy_with_logits(LOGITS, SEVERAL, pos_weight=OF_CLASSES)
    same(Loss("classes", class_weights=OF_CLASSES).train(LOGITS, SEVERAL), expected)
    smooth = Loss("classes", label_smoothing=0.2)
    same(smooth.train(LOGITS, SEVERAL), F.binary_cross_entropy_with_logits(LOGITS, 0.8 * SEVERAL + 0.1))
    same(smooth.plain(LOGITS, SEVERAL), F.binary_cross_entropy_with_logits(LOGITS, SEVERAL))


def test_a_number_is_standardized():
    truths = torch.tensor([10.0, 30.0])
    loss = Loss("number", number_mean=20.0, number_std=5.0)
    assert loss.train(torch.tensor([[-2.0], [2.0]]), truths) == 0
    assert loss.train(torch.tensor([[-1.0], [2.0]]), truths) == 0.5
    same(loss.train(torch.tensor([[-1.0], [2.0]]), truths, torch.tensor([3.0, 1.0])), 0.75)
