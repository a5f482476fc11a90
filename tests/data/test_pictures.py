"""What all sets of pictures share: augmentation, mixing, few shots, uneven classes, sizes that grow."""

from __future__ import annotations

import math
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torchvision.models import ResNet50_Weights

from lora_lightning.data.augment import POLICIES, AugmentConfig
from lora_lightning.data.imbalance import balanced_sampler, class_weights, logit_adjustment
from lora_lightning.data.mixing import mixed
from lora_lightning.data.picture_sets import PictureSet
from lora_lightning.data.picture_transform import (
    evaluation_transform,
    preprocessing_of,
    unfinished_training_transform,
    weights_config,
)
from lora_lightning.data.pictures import PictureDataModule
from lora_lightning.data.progressive import Progressive
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.classification import ImageClassifier
from tests.data.drawn import photo

CONF = Path(__file__).parents[2] / "conf" / "data" / "augment"


class Drawn(PictureSet):
    """Photographs drawn as they are asked for."""

    def __init__(self, targets, weights=None) -> None:
        self.targets, self.weights = torch.as_tensor(targets), weights

    def picture(self, index: int, least: int | None = None) -> Image.Image:
        return photo(("disc", "square")[index % 2], index)


class DrawnPictures(PictureDataModule):
    """Twelve of the first class, four of the second."""

    def read(self, part):
        self.class_names = ["disc", "square"]
        return Drawn([0, 0, 0, 1] * 4)


def module(**options) -> PictureDataModule:
    return DrawnPictures(**{"num_workers": 0, "image_size": 16, "batch_size": 4, **options})


def presets() -> list[str]:
    return sorted(file.stem for file in CONF.glob("*.yaml"))


@pytest.mark.parametrize("name", presets())
def test_presets_set_every_option_to_what_it_may_be(name):
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    config = AugmentConfig(**values)
    assert set(values) == set(config.to_dict())
    picture = unfinished_training_transform(preprocessing_of(None, 32), config)(photo("disc", 0))
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8


def test_without_augmentation_training_shows_what_evaluation_does():
    data = module(augment=yaml.safe_load((CONF / "none.yaml").read_text()))
    shown, plain = data.train_dataloader().dataset.dataset, data.val_dataloader().dataset
    assert all(torch.equal(a[0], b[0]) for a, b in zip(shown, plain, strict=True))


def test_the_presets_differ_as_they_say():
    values = {name: yaml.safe_load((CONF / f"{name}.yaml").read_text()) for name in presets()}
    facts, picture = preprocessing_of(None, 64), photo("square", 3, 64)

    def colours(name: str) -> set[bytes]:
        whole = AugmentConfig(**{**values[name], "crop_scale": None, "hflip": 0})
        transform = unfinished_training_transform(facts, whole)
        return {transform(picture).numpy().tobytes() for _ in range(6)}

    torch.manual_seed(0)
    assert len(colours("light")) == 1
    assert all(len(colours(name)) > 1 for name in ("randaugment", "trivialaugment", "strong"))


@pytest.mark.parametrize("policy", [*POLICIES, "rand-m10-n4-inc1"])
def test_policies_at_their_strongest(policy):
    """timm's posterizing to no bits at all, among others, which Pillow refuses."""
    transform = unfinished_training_transform(preprocessing_of(None, 16), AugmentConfig(auto_augment=policy))
    picture = photo("disc", 0, 16)
    torch.manual_seed(0)
    random.seed(0)
    assert all(transform(picture).shape == (3, 16, 16) for _ in range(100))


def test_facts_alone_make_what_evaluation_shows(tmp_path):
    """Of a model with a data config of its own, as the loader and the device make it together."""
    model = timm.create_model("test_vit", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.7})
    facts = preprocessing_of(model, None)
    assert facts == {
        "input_size": [3, 160, 160], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic", "crop_pct": 0.7, "crop_mode": "center",
    }  # fmt: skip
    data = module(image_size=None)
    data._facts = facts
    (images, targets), *_ = data.test_dataloader()
    whole, _ = data.finish(images, targets, training=False)
    alone = torch.stack([evaluation_transform(facts)(data.test_set.picture(i)) for i in range(4)])
    torch.testing.assert_close(alone, whole)


def test_torchvisions_transforms_as_facts():
    preset = ResNet50_Weights.IMAGENET1K_V2.transforms()
    model = torch.nn.Linear(1, 1)
    model.pretrained_cfg = weights_config(preset)
    picture = photo("disc", 0, 300)
    ours = evaluation_transform(preprocessing_of(model))(picture)
    torch.testing.assert_close(ours, preset(picture))


def test_a_strip_does_not_fill_the_memory():
    facts = preprocessing_of(None, 32)
    strip = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 30_000, 3))[:1])
    assert evaluation_transform(facts)(strip).shape == (3, 32, 32)
    assert evaluation_transform(facts)(strip.rotate(90, expand=True)).shape == (3, 32, 32)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("kind", ["class", "classes", "number"])
def test_a_mixed_batch_costs_what_its_pictures_cost(alphas, kind):
    """With weights too: the loss is linear in the target, and so is the mixture."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 8, 8)
    targets = {"class": torch.eye(6), "classes": (torch.rand(6, 6) < 0.5).float(), "number": torch.randn(6)}[
        kind
    ]
    logits = torch.randn(6, 6).double()

    def cost(targets):
        if kind == "number":
            return logits[:, 0] * targets  # any that is linear
        loss = F.cross_entropy if kind == "class" else F.binary_cross_entropy_with_logits
        cost = loss(logits, targets.double(), reduction="none")
        return cost if cost.ndim == 1 else cost.mean(1)

    weights = torch.rand(6) * 3
    torch.manual_seed(1)
    seen, own, none = mixed(images, targets, None, *alphas)
    torch.manual_seed(1)
    again, weighted, total = mixed(images, targets, weights, *alphas)
    assert none is None and torch.equal(seen, again) and not torch.equal(seen, images)
    share = float(
        ((own - targets.roll(1, 0)) / (targets - targets.roll(1, 0)))[targets != targets.roll(1, 0)][0]
    )
    assert 0 < share < 1
    expected = share * weights * cost(targets) + (1 - share) * weights.roll(1) * cost(targets.roll(1, 0))
    torch.testing.assert_close(total * cost(weighted), expected, atol=1e-5, rtol=1e-5)
    same = (seen == images).float().mean()
    if alphas == (0.0, 1.0):
        assert abs(float(same) - share) < 1e-6


def test_few_shots_of_each_class():
    data = module(shots=3)
    assert torch.bincount(data.train_set.targets).tolist() == [3, 3]
    assert len(data.val_set) == 16
    assert not torch.equal(data.train_set.indices, module(shots=3, seed=1).train_set.indices)
    assert torch.bincount(module(shots=9).train_set.targets).tolist() == [9, 4]


def test_uneven_classes():
    assert module().provides.keys() == {"num_classes", "class_names", "target"}
    assert module(imbalance="class_weights").provides["class_weights"] == pytest.approx([16 / 24, 16 / 8])
    adjusted = module(imbalance="logit_adjustment").provides["logit_adjustment"]
    assert adjusted == pytest.approx([math.log(12 / 16), math.log(4 / 16)])
    loader = module(
        imbalance="balanced_sampler", batch_size=16, augment={"crop_scale": None}
    ).train_dataloader()
    drawn = []
    for epoch in range(40):
        loader.sampler.set_epoch(epoch)
        drawn += [int(t) for _, targets in loader for t in targets]
    assert len(drawn) == 640 and abs(sum(drawn) / 640 - 0.5) < 0.06
    first = torch.cat([t for _, t in loader])
    assert torch.equal(first, torch.cat([t for _, t in loader]))  # a function of seed and epoch


def test_uneven_classes_of_which_a_picture_has_several():
    targets = torch.tensor([[1, 0, 0]] * 8 + [[1, 1, 0]] * 2).float()
    assert class_weights(targets, 3) == pytest.approx([0.05, 4, 1])
    shares = [0.95, 0.2, 0.05]
    assert logit_adjustment(targets, 3) == pytest.approx([math.log(p / (1 - p)) for p in shares])
    each = balanced_sampler(targets, 3).weights
    assert each[0] == pytest.approx(0.1) and each[9] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "done", "size"),
    [
        ({}, 0, 112), ({}, 0.5, 112), ({}, 0.65, 168), ({}, 0.8, 224), ({}, 1, 224),
        ({"start": 1}, 0, 224), ({"delay": 1, "finetune": 0}, 0.99, 112),
        ({"delay": 0, "finetune": 1}, 0, 224),
        ({"start": 0.3, "delay": 0, "finetune": 0}, 0.5, 144),
    ],
)  # fmt: skip
def test_sizes_grow(options, done, size):
    assert Progressive(**options).size(224, done, 4) == size


class Sizes(Callback):
    """The sizes of the training pictures, as they reach the steps."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(batch[0].shape[-1])


class Stop(Callback):
    """Ends a training early, as a kill does."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def fitted(folder: Path, limit: int = 5, resume: Path | None = None, **model) -> list[int]:
    """The sizes seen in a training of five epochs, or in a part of it."""
    sizes = Sizes()
    task = ImageClassifier(timm.create_model("test_vit", num_classes=2, img_size=32, depth=1, **model), 2)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=5, callbacks=[sizes, Stop(limit)], logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(task, module(image_size=None, progressive=True), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return sizes.seen


def test_pictures_grow_in_training_by_whole_patches(tmp_path):
    seen = fitted(tmp_path, dynamic_img_size=True)
    assert seen == [16] * 16 + [32] * 4  # patches of 16 pixels
    before = fitted(tmp_path, limit=2, dynamic_img_size=True)
    assert before + fitted(tmp_path, resume=tmp_path / "last.ckpt", dynamic_img_size=True) == seen
    with pytest.raises(ConfigError, match="progressive: VisionTransformer takes pictures of 32 x 32 alone"):
        fitted(tmp_path, dynamic_img_size=False)


def test_sizes_cannot_follow_steps_that_nobody_knows():
    """They would stay the first size for ever."""
    data = module(image_size=None, progressive=True)
    data.trainer = L.Trainer(max_epochs=-1, logger=False, barebones=True)
    data.trainer.strategy._lightning_module = L.LightningModule()
    with pytest.raises(ConfigError, match=r"progressive: sizes follow the number of steps.*max_epochs or"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"progressive": 3}, "progressive=3: give true, null, or a mapping"),
        ({"progressive": {"start": 2, "begin": 1}}, "progressive.start=2"),
        ({"progressive": {"begin": 1}}, "progressive.begin=1 is not an option"),
        ({"augment": "strong"}, "A preset is chosen by data/augment=strong."),
        ({"augment": {"mixupp": 1}}, "Did you mean 'mixup'"),
        ({"augment": {"auto_augment": "trivialaugmen"}}, "Did you mean 'trivialaugment'"),
        ({"imbalance": "sampler"}, "Did you mean 'balanced_sampler'"),
    ],
)
def test_bad_options(given, told):
    with pytest.raises(ConfigError) as error:
        module(**given)
    assert told in str(error.value)
