"""ImageClassifier in a Trainer: what it logs, which labels it takes, what its checkpoint holds."""

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lora_lightning import LoRACallback
from lora_lightning.errors import ConfigError
from lora_lightning.tasks import predictions
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.tasks.temperature import fitted_temperature


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
    assert set(test) == {"test/loss", "test/acc", "test/f1", "test/ece_raw"}


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


def targets_of(target, images):
    values = images.flatten(1)
    return {
        "class": values[:, :3].argmax(1),
        "classes": (values[:, :3] > 0).float(),
        "number": 40 + 9 * values[:, 0],
    }[target]


def data_of(target, count=60, seed=0, weights=False):
    images = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    more = [torch.ones(count)] if weights else []
    return DataLoader(TensorDataset(images, targets_of(target, images), *more), 16)


@pytest.mark.parametrize(
    ("target", "first", "options"),
    [
        ("class", "acc", {}),
        ("classes", "map", {}),
        ("number", "mae", {"number_mean": 40.0, "number_std": 9.0}),
    ],
)
def test_each_target_is_learned_scored_and_calibrated(target, first, options, tmp_path):
    seed_everything(0, verbose=False)
    outputs = 1 if target == "number" else 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, outputs))
    module = ImageClassifier(model, outputs, target=target, optim={"lr": 0.05}, **options)
    fitter = trainer(max_epochs=30)
    fitter.fit(module, data_of(target, weights=True), data_of(target, seed=1))
    assert module.scores[0].name == first == module.monitors[0]
    assert module.temperature is None  # until it is validated by itself
    names = {s.name for s in module.scores} - {"ece", "ece_raw", "source", "source_off"}
    assert {f"val/{n}" for n in names} <= set(fitter.callback_metrics)
    value = float(fitter.callback_metrics[f"val/{first}"])
    assert value < 2 if target == "number" else value > 0.8  # of 9
    (plain,) = fitter.test(module, data_of(target, seed=2), verbose=False)
    fitter.validate(module, data_of(target, seed=1), verbose=False)
    (test,) = fitter.test(module, data_of(target, seed=2), verbose=False)
    extra = set() if target == "number" else {"test/ece"}
    assert set(test) == set(plain) | extra
    changed = {"test/ece", "test/ece_raw"}
    assert {k: v for k, v in test.items() if k not in changed} == {
        k: v for k, v in plain.items() if k not in changed
    }
    bounds = module.intervals()
    assert bounds[first][0] <= test[f"test/{first}"] <= bounds[first][1]
    if target == "number":
        assert module.facts() == {}
    else:
        assert test["test/ece_raw"] == plain["test/ece_raw"] != test["test/ece"]
        assert module.facts() == {"temperature": module.temperature}
        predictions = module.predictions
        expected = fitted_temperature(*evaluated(module, data_of(target, seed=1)))
        assert module.temperature == predictions.temperature == pytest.approx(expected, rel=1e-5)
    assert module.report(None, str(tmp_path)) is not None
    assert (tmp_path / "report.html").exists()


def evaluated(module, loader):
    images, targets = loader.dataset.tensors
    with torch.no_grad():
        return module(images), targets


def test_what_was_before_has_a_temperature_of_its_own():
    """So that its calibration error is the one of the base that is tested by itself."""
    seed_everything(0, verbose=False)
    module, fitter = (
        classifier(),
        trainer(max_epochs=3, callbacks=[LoRACallback(rank=2, target_modules="all")]),
    )
    trainer().validate(module, loader(), verbose=False)
    (base,) = trainer().test(module, loader(), verbose=False)
    fitter.fit(module, loader())
    assert module.temperature_before is None
    fitter.validate(module, loader(), verbose=False)
    fitter.test(module, loader(), verbose=False)
    before = module.before()["scores"]
    assert before["ece"] != before["ece_raw"]
    for name in ("acc", "ece", "ece_raw"):
        assert before[name] == pytest.approx(base[f"test/{name}"], abs=1e-6)


def test_a_new_fit_forgets_the_temperature():
    module = classifier()
    trainer().validate(module, loader(), verbose=False)
    assert module.temperature is not None
    trainer(max_steps=1).fit(module, loader())
    assert module.temperature is None
    silent = classifier(calibrate=False)
    trainer().validate(silent, loader(), verbose=False)
    assert silent.facts() == {}
    (error,) = (s for s in silent.scores if s.name.startswith("ece"))
    assert error.label == "uncalibrated ECE %" and error.in_table


def test_mirror_images_count_in_the_test_alone():
    module = classifier(test_flips=True)
    images, labels = loader().dataset.tensors
    trainer().test(module, loader(), verbose=False)
    expected = (module(images) + module(images.flip(-1))) / 2
    torch.testing.assert_close(module.predictions.outputs, expected)
    fitter = trainer(max_epochs=1)
    fitter.fit(module, loader(), loader())
    plain = F.cross_entropy(module(images), labels)
    assert float(fitter.callback_metrics["val/loss"]) == pytest.approx(float(plain), rel=1e-5)


def test_what_the_model_said_before_is_kept_beside(tmp_path):
    module = classifier()
    images = loader().dataset.tensors[0]
    with torch.no_grad():  # by the batches of the test: others may take another kernel, of other bits
        before = torch.cat([module(batch) for batch, _ in loader()])
    callback = LoRACallback(rank=2, target_modules="all", verbose=False)
    fitter = trainer(max_epochs=3, callbacks=[callback])
    fitter.fit(module, loader())
    fitter.test(module, loader(), verbose=False)
    torch.testing.assert_close(module.predictions.before, before, rtol=0, atol=0)
    torch.testing.assert_close(module.predictions.outputs, module(images))
    assert not torch.allclose(before, module.predictions.outputs)


def test_the_source_domain_is_tested_with_and_without_the_adapter():
    class Digits(LightningDataModule):
        def train_dataloader(self):
            return loader()

        test_dataloader = train_dataloader

        def source_dataloader(self):
            images, labels = loader().dataset.tensors
            return DataLoader(TensorDataset(images * 3, labels), 7)

    module = classifier(optim={"lr": 0.1})
    images, labels = loader().dataset.tensors

    def right():
        return float((module(images * 3).argmax(1) == labels).float().mean())

    before = right()
    fitter = trainer(max_epochs=10, callbacks=[LoRACallback(rank=2, target_modules="all", verbose=False)])
    fitter.fit(module, datamodule=Digits())
    (test,) = fitter.test(module, datamodule=Digits(), verbose=False)
    assert test["test/source_off"] == pytest.approx(before)
    assert test["test/source"] == pytest.approx(right())
    assert before != right()


def test_what_does_not_go_together_is_named_at_once():
    model = nn.Linear(2, 3)
    cases = [
        ({"num_classes": 3, "target": "number"}, "num_classes=3: target=number has one output"),
        ({"num_classes": 1}, "num_classes=1: give a whole number of at least 2"),
        ({"class_names": ["a"]}, "class_names: 1 entries for num_classes=3"),
        ({"class_weights": [1, -1, 1]}, "class_weights: -1 is below 0"),
        ({"logit_adjustment": [1.0] * 4}, "logit_adjustment: 4 entries for num_classes=3"),
        ({"num_classes": 1, "target": "number", "label_smoothing": 0.1}, "label_smoothing=0.1: a number has"),
        (
            {"num_classes": 1, "target": "number", "class_weights": [1.0]},
            "class_weights: a number has no classes",
        ),
        ({"target": "label"}, "target='label': give one of class, classes, number"),
    ]
    for options, told in cases:
        with pytest.raises(ConfigError) as caught:
            ImageClassifier(model, **{"num_classes": 3, **options})
        assert len(caught.value.problems) == 1
        assert told in caught.value.problems[0]


def test_shares_of_several_processes_are_put_together_in_order(monkeypatch):
    """As a distributed sampler deals them, and fills up the last share."""
    dataset = TensorDataset(torch.arange(7))
    samplers = [DistributedSampler(dataset, 3, rank, shuffle=False) for rank in range(3)]
    shares = [torch.tensor(list(sampler)) for sampler in samplers]
    monkeypatch.setattr(predictions.dist, "get_world_size", lambda: 3)

    def gather(into, rows):
        into[:] = [share.view(-1, 1).float() if rows.ndim == 2 else share for share in shares]

    monkeypatch.setattr(predictions.dist, "all_gather_object", gather)
    collector = predictions.Collector()
    collector.add(shares[1].view(-1, 1).float(), shares[1])
    found = collector.all("class", DataLoader(dataset, 2, sampler=samplers[1]))
    assert found.truths.tolist() == list(range(7)) == found.outputs[:, 0].tolist()
