"""ImageClassifier in a Trainer: what it logs, which labels it takes, what its checkpoint holds."""

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.errors import ConfigError
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim_config import OptimConfig


class Rates(Callback):
    """Records the rate of every step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def classifier(**options):
    return ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 3, **options)


def loader(count=24, batch_size=5, soft=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 2, 2, generator=generator)
    labels = images.flatten(1)[:, :3].argmax(1)
    labels = F.one_hot(labels, 3).float() if soft else labels
    return DataLoader(TensorDataset(images, labels), batch_size)


def trainer(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_it_learns_and_logs_what_it_says():
    seed_everything(0, verbose=False)
    module, fitter = classifier(optim=OptimConfig(lr=0.1)), trainer(max_epochs=20)
    fitter.fit(module, loader(), loader())
    assert {"train/loss", "val/loss", "val/acc"} <= set(fitter.callback_metrics)
    assert fitter.callback_metrics["val/acc"] >= 0.9
    (test,) = fitter.test(module, loader(), verbose=False)
    assert set(test) == {"test/loss", "test/acc", "test/f1", "test/ece"}


def test_accuracy_and_loss_count_images_not_batches():
    module = classifier()
    (metrics,) = trainer().test(module, loader(batch_size=5), verbose=False)  # the last batch holds 4
    images, labels = loader().dataset.tensors
    logits = module(images)
    assert metrics["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_soft_labels_give_the_loss_and_accuracy_of_the_hard_ones():
    module = classifier(label_smoothing=0.1)
    hard, soft = next(iter(loader())), next(iter(loader(soft=True)))
    module.log = lambda *args, **kwargs: None
    torch.testing.assert_close(module.training_step(hard, 0), module.training_step(soft, 0))
    runs = [trainer().test(module, loader(soft=s), verbose=False)[0] for s in (False, True)]
    assert runs[0] == pytest.approx(runs[1])


def test_label_smoothing_is_for_training_alone():
    plain, smooth = classifier(), classifier(label_smoothing=0.3)
    smooth.load_state_dict(plain.state_dict())
    runs = [trainer().validate(m, loader(), verbose=False)[0] for m in (plain, smooth)]
    assert runs[0] == pytest.approx(runs[1])
    plain.log = smooth.log = lambda *args, **kwargs: None
    batch = next(iter(loader()))
    assert plain.training_step(batch, 0) != smooth.training_step(batch, 0)


def test_the_schedule_is_stepped_each_step_over_the_whole_fit():
    recorder = Rates()
    module = classifier(optim={"lr": 0.01, "schedule": {"warmup": 0.2}})
    trainer(max_epochs=4, callbacks=[recorder]).fit(module, loader())
    assert len(recorder.rates) == 20
    assert recorder.rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert max(recorder.rates) == pytest.approx(0.01)
    assert recorder.rates[-1] < 0.01 * 0.02


def test_gradient_accumulation_still_ends_near_zero():
    recorder = Rates()
    module = classifier(optim={"lr": 0.01})
    trainer(max_epochs=4, accumulate_grad_batches=2, callbacks=[recorder]).fit(module, loader())
    assert recorder.rates[-1] < 0.01 * 0.1


def test_only_what_requires_a_gradient_is_optimized():
    module = classifier()
    module.model[1].weight.requires_grad_(False)
    before = module.model[1].weight.clone()
    fitter = trainer(max_epochs=1)
    fitter.fit(module, loader())
    assert [p.shape for g in fitter.optimizers[0].param_groups for p in g["params"]] == [(3,)]
    assert torch.equal(module.model[1].weight, before)


def test_the_checkpoint_holds_plain_types_and_rebuilds_the_module(tmp_path):
    config = OptimConfig(lr=0.02, betas=[0.9, 0.95])
    module, fitter = classifier(optim=config, label_smoothing=0.1), trainer(max_epochs=1)
    fitter.fit(module, loader())
    fitter.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {
        "num_classes": 3, "class_names": None, "target": "class", "class_weights": None, "number_mean": None,
        "number_std": None, "logit_adjustment": None, "optim": config.to_dict(), "label_smoothing": 0.1,
        "test_flips": False, "calibrate": True,
    }  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    again = ImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", model=model)
    assert again.optim == config
    images = torch.randn(2, 3, 2, 2)
    assert torch.equal(again(images), module(images))


def test_all_bad_options_are_named_in_one_error():
    model = nn.Linear(2, 3)
    model.num_classes = 3
    with pytest.raises(ConfigError) as error:
        ImageClassifier(model, 10, optim={"lr": -1, "moment": 0.9}, label_smoothing=1)
    problems = error.value.problems
    assert len(problems) == 4
    assert any("num_classes=10: the model gives 3 logits" in p for p in problems)
    assert any(p.startswith("label_smoothing=1:") for p in problems)


@pytest.mark.parametrize("num_classes", [1, 2.5, True, "10"])
def test_a_bad_number_of_classes_is_refused(num_classes):
    with pytest.raises(ConfigError, match="num_classes="):
        ImageClassifier(nn.Linear(2, 2), num_classes)


def test_an_endless_fit_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.max_epochs=-1"):
        trainer(max_epochs=-1).fit(classifier(), loader())


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [("bf16-mixed", None, True), ("bf16-mixed", 1.0, False), ("32-true", 1.0, True)],
)
def test_updates_are_fused_where_lightning_allows(precision, clip, fused):
    fitter = trainer(precision=precision, gradient_clip_val=clip, max_steps=1)
    fitter.fit(classifier(), loader())
    assert {bool(group["fused"]) for group in fitter.optimizers[0].param_groups} == {fused}
