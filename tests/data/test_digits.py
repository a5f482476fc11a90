"""The digits: a fixed split, fixed validation and test images, training images ever anew."""

import pytest
import torch
from lightning import Trainer, seed_everything

from lora_lightning.data.digits import DigitsDataModule, _place, load_scans, render, split_indices
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.classification import ImageClassifier


class Recorder(ImageClassifier):
    """Keeps the batches that the Trainer hands over."""

    def __init__(self):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10)), 10)
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)
        super().validation_step(batch, batch_idx)


def fit(data, epochs=1, precision="32-true"):
    seed_everything(0, verbose=False)
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=data)
    return recorder


def test_split_is_fixed_disjoint_and_complete():
    pool, val, test = split_indices()
    assert (len(pool), len(val), len(test)) == (900, 300, 597)
    assert sorted(torch.cat([pool, val, test]).tolist()) == list(range(1797))
    assert all(torch.equal(a, b) for a, b in zip(split_indices(), (pool, val, test), strict=True))


def test_train_size_takes_the_first_of_the_pool_and_leaves_the_other_splits():
    small, large = DigitsDataModule(train_size=50), DigitsDataModule(train_size=900)
    small.setup()
    large.setup()
    assert len(small.train_set) == 50
    assert len(large.train_set) == 900
    assert torch.equal(small.train_set.tensors[0], large.train_set.tensors[0][:50])
    assert torch.equal(small.test_set.tensors[0], large.test_set.tensors[0])


def test_every_class_is_in_every_split():
    data = DigitsDataModule()
    data.setup()
    for split in (data.train_set, data.val_set, data.test_set):
        counts = torch.bincount(split.tensors[1], minlength=data.provides["num_classes"])
        assert len(counts) == 10
        assert counts.min() >= 0.05 * len(split)


@pytest.mark.parametrize("domain", ["source", "target"])
def test_validation_and_test_images_do_not_depend_on_options_or_random_state(domain):
    first = DigitsDataModule(domain, train_size=100, seed=0)
    first.setup()
    torch.manual_seed(123)
    second = DigitsDataModule(domain, train_size=300, seed=7)
    second.setup("test")
    assert torch.equal(first.val_set.tensors[0], second.val_set.tensors[0])
    assert torch.equal(first.test_set.tensors[0], second.test_set.tensors[0])


@pytest.mark.parametrize("domain", ["source", "target"])
def test_images_are_normalized_colour_of_16_by_16(domain):
    scans, _ = load_scans()
    images = render(scans[:64], domain, torch.Generator().manual_seed(0))
    pixels = images * 0.35 + 0.3
    assert images.shape == (64, 3, 16, 16)
    assert images.dtype == torch.float32
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert pixels.amax(dim=(1, 2, 3)).min() > 0.3  # ink in every image


def test_the_domains_differ_by_colour_and_ground():
    scans, _ = load_scans()
    source = render(scans[:200], "source", torch.Generator().manual_seed(0)) * 0.35 + 0.3
    target = render(scans[:200], "target", torch.Generator().manual_seed(0)) * 0.35 + 0.3
    colourfulness = [images.std(dim=1).mean().item() for images in (source, target)]
    assert colourfulness[0] == 0
    assert colourfulness[1] > 0.05
    corners = [images[:, :, :2, :2].mean().item() for images in (source, target)]
    assert corners[0] < 0.05 < 0.1 < corners[1]


def test_placing_without_turn_scale_or_shift_is_the_scan():
    scans, _ = load_scans()
    zero = torch.zeros(8)
    placed = _place(scans[:8], zero, zero + 1, torch.zeros(8, 2))
    torch.testing.assert_close(placed, scans[:8], atol=1e-5, rtol=0)
    turned = _place(scans[:8], zero + 90, zero + 1, torch.zeros(8, 2))
    torch.testing.assert_close(turned, scans[:8].rot90(dims=(2, 3)), atol=1e-4, rtol=0)


def test_training_images_are_drawn_anew_each_epoch_and_validation_images_are_not():
    data = DigitsDataModule(train_size=32, batch_size=32)
    recorder = fit(data, epochs=2)
    (first, y1), (second, y2) = recorder.train_batches
    assert first.shape == (32, 3, 16, 16)
    assert sorted(y1.tolist()) == sorted(y2.tolist())
    assert not torch.equal(y1, y2)  # shuffled
    by_image = torch.cdist(first.flatten(1), second.flatten(1))
    assert by_image.min() > 1  # no image occurs twice
    for images, _ in recorder.val_batches:
        assert any(torch.equal(images, fixed) for fixed in data.val_set.tensors[0].split(128))


def test_training_images_are_drawn_in_float32_and_given_in_the_precision_in_use():
    recorder = fit(DigitsDataModule(train_size=32, batch_size=32), precision="bf16-true")
    assert {images.dtype for images, _ in recorder.train_batches} == {torch.bfloat16}


def test_the_same_seeds_give_the_same_training_batches_and_another_seed_another_order():
    runs = [fit(DigitsDataModule(train_size=64, seed=seed)).train_batches for seed in (0, 0, 1)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0][1], runs[2][0][1])


def test_all_bad_options_are_named_in_one_error():
    with pytest.raises(ConfigError) as error:
        DigitsDataModule(domain="targets", train_size=901, batch_size=0, seed=-1)
    problems = error.value.problems
    assert len(problems) == 4
    assert "domain='targets'" in problems[0]
    assert "Did you mean 'target'?" in problems[0]
    assert "train_size=901: give a whole number from 1 to 900" in problems[1]


def test_hyperparameters_are_plain():
    assert dict(DigitsDataModule("source", 900, 64, 3).hparams) == {
        "domain": "source",
        "train_size": 900,
        "batch_size": 64,
        "seed": 3,
    }
