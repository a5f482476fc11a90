"""PictureDataModule on files of CIFAR's own format: options, split, augmentation, a Trainer."""

from __future__ import annotations

import os

import lightning as L
import numpy as np
import pytest
import timm
import torch

from lora_lightning.data.named_sets import NamedSetDataModule
from lora_lightning.data.picture_sets import stratified_split
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.classification import ImageClassifier


def module(root: str, **options) -> NamedSetDataModule:
    data = NamedSetDataModule(
        **{"root": root, "batch_size": 8, "num_workers": 0, "val_share": 0.2, "image_size": 32, **options}
    )
    data.prepare_data()
    data.setup()
    return data


def classifier(classes: int = 10) -> ImageClassifier:
    model = timm.create_model(
        "test_vit",
        num_classes=classes,
        img_size=48,
        dynamic_img_size=False,
        pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)},
    )
    return ImageClassifier(model, classes)


def trainer(**options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 2, "limit_val_batches": 1, **options},
    )


def test_parts_and_batches(cifar10):
    data = module(cifar10)
    train, val, test = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert (len(train.dataset), len(val.dataset), len(test.dataset)) == (80, 20, 20)
    assert (len(train), len(val), len(test)) == (10, 3, 3)
    images, labels = next(iter(train))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.shape == (8,)
    assert data.provides["num_classes"] == len(data.class_names) == 10


def test_cifar100(cifar100):
    data = module(cifar100, name="cifar100", val_share=0.5)
    assert data.provides["num_classes"] == 100
    assert data.class_names[7] == "fine 7"
    assert torch.bincount(data.val_set.targets).tolist() == [1] * 100


def arrays(pictures) -> np.ndarray:
    return np.stack([np.asarray(pictures.picture(i)) for i in range(len(pictures))])


def test_images_keep_their_labels(cifar10):
    for images, labels in module(cifar10).val_dataloader():
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_split_is_seeded_stratified_and_complete(cifar10):
    first, again, other = (module(cifar10, seed=s) for s in (0, 0, 1))
    assert np.array_equal(arrays(first.val_set), arrays(again.val_set))
    assert not np.array_equal(arrays(first.val_set), arrays(other.val_set))
    assert torch.bincount(first.val_set.targets).tolist() == [2] * 10
    every = np.concatenate([arrays(first.train_set), arrays(first.val_set)]).reshape(100, -1)
    assert len(np.unique(every, axis=0)) == 100


def test_split_of_uneven_classes():
    labels = torch.tensor([0] * 90 + [1] * 10)
    train, val = stratified_split(labels, 20, seed=0)
    assert torch.bincount(labels[val]).tolist() == [18, 2]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))


def test_order_follows_the_seed(cifar10):
    data = module(cifar10)
    first = torch.cat([y for _, y in data.train_dataloader()])
    again = torch.cat([y for _, y in data.train_dataloader()])
    data.seed = 1
    other = torch.cat([y for _, y in data.train_dataloader()])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_images_vary_and_evaluation_images_do_not(cifar10):
    data = module(cifar10)
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert len({train[0][0].numpy().tobytes() for _ in range(5)}) > 1
    assert torch.equal(val[0][0], val[0][0])
    assert np.array_equal(val[0][0].permute(1, 2, 0).numpy(), arrays(data.val_set)[0])


def test_crop_scale_and_flip_reach_the_augmentation(cifar10):
    data = module(cifar10, augment={"crop_scale": (1.0, 1.0), "hflip": 0.0})
    white = data.train_set.whole.data
    white[:] = 0
    white[:, :, 16:] = 255  # right half white
    image = data.train_dataloader().dataset[0][0].float()
    assert image[..., -4:].mean() > 250
    assert image[..., :4].mean() < 5
    data.augment.hflip = 1.0
    assert data.train_dataloader().dataset[0][0][..., :4].float().mean() > 250


def test_auto_augment_changes_colours(cifar10):
    whole = {"crop_scale": (1.0, 1.0), "hflip": 0.0}
    data = module(cifar10, augment={**whole, "auto_augment": "rand-m9-n3"})
    plain = module(cifar10, augment=whole)
    pairs = zip(data.train_dataloader().dataset, plain.train_dataloader().dataset, strict=True)
    assert any(not torch.equal(a, b) for (a, _), (b, _) in pairs)


def test_finish_normalizes(cifar10):
    data = module(cifar10, augment={"mixup": 0, "cutmix": 0})
    images, labels = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(4)
    out, same = data.finish(images, labels, training=True)
    config = data.preprocessing()
    expected = (1 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(out[0, :, 5, 5], expected)
    assert torch.equal(same, labels)


@pytest.mark.parametrize("mixing", [{"mixup": 0.8, "cutmix": 0}, {"mixup": 0, "cutmix": 1.0}, None])
def test_mixing_gives_soft_labels_in_training_alone(cifar10, mixing):
    data = module(cifar10, augment=mixing)
    torch.manual_seed(0)
    images, labels = next(iter(data.val_dataloader()))
    plain, hard = data.finish(images, labels, training=False)
    mixed, soft = data.finish(images, labels, training=True)
    assert torch.equal(hard, labels)
    assert soft.shape == (8, 10)
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    assert not torch.equal(mixed, plain)


def test_cutmix_labels_match_the_area(cifar10):
    data = module(cifar10, augment={"cutmix": 1.0})
    torch.manual_seed(0)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[1] = 255
    mixed, soft = data.finish(images, torch.tensor([0, 1]), training=True)
    white = (mixed[0] > 0).float().mean()
    torch.testing.assert_close(white, soft[0, 1], atol=1e-6, rtol=0)


def test_mix_probability(cifar10):
    data = module(cifar10, augment={"mixup": 0.8, "mix_prob": 0.0})
    labels = torch.arange(8)
    assert torch.equal(data.finish(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), labels, True)[1], labels)


def test_erasing_in_training_alone(cifar10):
    data = module(cifar10, augment={"random_erasing": 1.0})
    images, labels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8)
    erased, plain = (data.finish(images, labels, training)[0] for training in (True, False))
    changed = (erased != plain).any(1).float().mean((1, 2))
    assert bool((changed > 0).all())
    assert float(changed.max()) < 0.5


def test_workers_give_what_this_process_gives(cifar10):
    here = module(cifar10).val_dataloader()
    workers = module(cifar10, num_workers=1).val_dataloader()
    assert workers.persistent_workers
    assert all(torch.equal(a[0], b[0]) for a, b in zip(here, workers, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_default_workers_are_bounded(cifar10, monkeypatch):
    for cores, workers in ((1, 1), (4, 4), (96, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert module(cifar10, num_workers=None).val_dataloader().num_workers == workers


class Recorder(L.Callback):
    """The batches as they reach the steps."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(batch)


def test_a_trainer_fits_and_tests_at_the_models_size(cifar10):
    data = NamedSetDataModule(root=cifar10, batch_size=8, num_workers=0, val_share=0.2)
    seen, task = Recorder(), classifier()
    run = trainer(callbacks=[seen])
    before = task.model.patch_embed.proj.weight.clone()
    run.fit(task, data)
    assert not torch.equal(before, task.model.patch_embed.proj.weight)
    images, labels = seen.train[0]
    assert images.shape == (8, 3, 48, 48)
    assert images.dtype == torch.float32
    assert labels.shape == (8, 10)
    assert seen.val[0][1].shape == (8,)  # sanity check included
    assert data.preprocessing()["mean"] == [0.1, 0.2, 0.3]
    assert "test/acc" in run.test(task, data, verbose=False)[0]


def test_true_half_precision_reaches_the_batch(cifar10):
    seen = Recorder()
    data = NamedSetDataModule(root=cifar10, batch_size=8, num_workers=0, val_share=0.2)
    trainer(callbacks=[seen], precision="bf16-true", max_steps=1).fit(classifier(), data)
    assert seen.train[0][0].dtype == torch.bfloat16


def test_image_size_against_a_model_of_fixed_size(cifar10):
    data = NamedSetDataModule(root=cifar10, batch_size=8, num_workers=0, val_share=0.2, image_size=64)
    with pytest.raises(ConfigError, match="image_size=64: VisionTransformer takes 48 x 48"):
        trainer().fit(classifier(), data)


def test_every_bad_option_in_one_error():
    with pytest.raises(ConfigError) as error:
        NamedSetDataModule(
            name="cifar-10",
            root="",
            download="yes",
            batch_size=0,
            num_workers=-1,
            val_share=0,
            seed=-1,
            image_size=2.5,
            augment={
                "crop_scale": (0.9, 0.3),
                "hflip": 1.5,
                "auto_augment": "randaug",
                "random_erasing": -0.1,
                "mixup": -1,
                "cutmix": True,
                "mix_prob": float("nan"),
            },
        )
    assert len(error.value.problems) == 15
    assert "Did you mean 'cifar10'" in error.value.problems[0]


def test_a_validation_part_that_leaves_nothing_to_train_on(cifar10):
    with pytest.raises(ConfigError, match=r"val_share=0.001: of 100 training pictures that is 0"):
        module(cifar10, val_share=0.001)


def test_a_batch_larger_than_the_training_part_is_the_whole_of_it(cifar10):
    assert [len(labels) for _, labels in module(cifar10, batch_size=81).train_dataloader()] == [80]
