"""LoRACallback beside the rest of Lightning: other callbacks, optimizers, modes of the Trainer, the Tuner,
LightningCLI, Fabric and a plain loop."""

import copy
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from small import Classifier, cnn, loader, trainer
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


class Owner(Classifier):
    def __init__(self, lr: float = 0.05) -> None:
        torch.manual_seed(11)
        super().__init__(cnn(), lr)
        for index in (1, 4):  # as a pretrained model has them
            self.model[index].running_mean.normal_()
            self.model[index].running_var.uniform_(0.5, 2)


def names(module, trained=False):
    return [n for n, p in module.named_parameters() if p.requires_grad or not trained]


def frozen(module):
    """Everything that training must not change, by name."""
    state = dict(module.named_parameters())
    kept = {n: p.detach().clone() for n, p in state.items() if ".lora." not in n and "model.9" not in n}
    return kept | {n: b.clone() for n, b in module.named_buffers() if "running" in n}


def outputs(module):
    return module.eval()(torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5)))


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_weights_in_either_order(name, tmp_path):
    """The same result in either order; the average holds the updates, and nothing frozen has moved."""

    def run(where):
        module = Owner()
        before = frozen(module)
        average, lora = AVERAGES[name](), ll.LoRACallback(rank=2)
        saver = ModelCheckpoint(tmp_path / where, save_last=True)
        order = [average, lora] if where == "before" else [lora, average]
        fitting = trainer(tmp_path, *order, saver, max_epochs=4)
        fitting.fit(module, loader(), loader())
        after = frozen(module)
        assert all(torch.equal(before[n], after[n]) for n in before)
        copied = average._average_model
        assert names(getattr(copied, "module", copied)) == names(module)
        return module

    module, other = run("before"), run("after")
    plain = Owner()
    trainer(tmp_path, ll.LoRACallback(rank=2), max_epochs=4).fit(plain, loader(), loader())
    assert torch.equal(outputs(module), outputs(other))
    assert not torch.equal(outputs(module), outputs(plain))
    for where in ("before", "after"):
        state = torch.load(tmp_path / where / "last.ckpt", weights_only=True)["state_dict"]
        assert {n for n, t in state.items() if t.numel()} == set(names(module, trained=True))
        ll.load_from_checkpoint(Owner, tmp_path / where / "last.ckpt")


def test_swa_renews_the_statistics_that_are_not_frozen(tmp_path):
    module = Owner()
    before = module.model[1].running_mean.clone()
    average = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer(tmp_path, average, ll.LoRACallback(rank=2, train_norm="stats"), max_epochs=3).fit(
        module, loader()
    )
    assert not torch.equal(module.model[1].running_mean, before)
    assert module.model[1].momentum == 0.1


def test_an_average_of_layers_built_late(tmp_path):
    class Late(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Identity()

        def configure_model(self) -> None:
            if isinstance(self.model, nn.Identity):
                torch.manual_seed(0)
                self.model = cnn()

    ends = []
    for order in (1, -1):
        module, average = Late(), EMAWeightAveraging(decay=0.5)
        trainer(tmp_path, *[average, ll.LoRACallback(rank=2)][::order]).fit(module, loader(), loader())
        ends.append(outputs(module))
        assert len(lora_layers(average._average_model)) == len(lora_layers(module)) > 0
    assert torch.equal(*ends)


def test_backbone_finetuning_is_refused(tmp_path):
    class Module(Owner):
        @property
        def backbone(self):
            return self.model

    for order in (1, -1):
        with pytest.raises(
            ll.ConfigError, match="BackboneFinetuning trains the backbone that LoRA keeps frozen"
        ):
            trainer(tmp_path, *[BackboneFinetuning(), ll.LoRACallback(rank=2)][::order]).fit(
                Module(), loader()
            )


def test_another_callback_that_freezes_the_updates_is_named(tmp_path):
    class Freezes(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.model)

        def finetune_function(self, *args):
            pass

    with pytest.raises(ll.UserError, match="4 of the 4 LoRA parameters were frozen after setup"):
        trainer(tmp_path, ll.LoRACallback(rank=2), Freezes()).fit(Owner(), loader())


def test_several_optimizers_and_manual_optimization(tmp_path):
    class Manual(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, index))
                optimizer.step()

        def configure_optimizers(self):
            heads = {id(p) for p in self.model[9].parameters()}
            updates = [p for p in self.parameters() if id(p) not in heads]
            return torch.optim.SGD(updates, lr=0.05), torch.optim.AdamW(self.model[9].parameters(), lr=0.01)

    whole = Manual()
    trainer(tmp_path, ll.LoRACallback(rank=2), max_epochs=4).fit(whole, loader())
    half = Manual()
    run = trainer(tmp_path, ll.LoRACallback(rank=2), max_epochs=2)
    run.fit(half, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Manual()
    trainer(tmp_path, ll.LoRACallback(rank=2), max_epochs=4).fit(
        resumed, loader(), ckpt_path=tmp_path / "x.ckpt"
    )
    assert torch.equal(outputs(whole), outputs(resumed))
    assert not torch.equal(outputs(whole), outputs(half))


def test_fit_then_fit_with_another_adapter(tmp_path):
    module = Owner()
    trainer(tmp_path, ll.LoRACallback(rank=2)).fit(module, loader())
    first, first_head = outputs(module), module.model[9].weight.detach().clone()
    callback = ll.LoRACallback(rank=3, adapter="scottish")
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(module, loader())
    assert ll.adapter_names(module) == ["default", "scottish"]
    second = outputs(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    ll.set_adapter(module, "default")
    assert torch.equal(outputs(module), first)
    trainer(tmp_path, ll.LoRACallback(rank=2)).test(module, loader(), verbose=False)
    assert torch.equal(outputs(module), first)  # a callback without a name takes what is selected
    run.test(module, loader(), verbose=False)  # the callback's adapter is selected again
    assert torch.equal(outputs(module), second)
    for fresh in (Owner(), ll.load_from_checkpoint(Owner, tmp_path / "x.ckpt")):
        run = trainer(tmp_path, ll.LoRACallback(rank=3, adapter="scottish"), max_epochs=3)
        run.test(fresh, loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
        assert torch.equal(outputs(fresh), second)
        ll.set_adapter(fresh, "default")
        assert torch.equal(fresh.model[9].weight, first_head)
        assert torch.equal(outputs(fresh), first)
    with pytest.raises(ll.AdapterFileError, match=r"select the same, LoRACallback\(adapter='scottish'\)"):
        trainer(tmp_path, ll.LoRACallback(rank=2)).test(Owner(), loader(), ckpt_path=tmp_path / "x.ckpt")
    resumed = Owner()
    run = trainer(tmp_path, ll.LoRACallback(rank=3, adapter="scottish"), max_epochs=5)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "x.ckpt")
    ll.set_adapter(resumed, "default")
    assert torch.equal(outputs(resumed), first)


@pytest.mark.parametrize("as_callback", [False, True])
def test_learning_rate_finder(as_callback, tmp_path):
    plain = Owner()
    trainer(tmp_path, ll.LoRACallback(rank=2)).fit(plain, loader())
    module = Owner()  # seeds again
    before = frozen(module)
    options = {"min_lr": 1e-4, "max_lr": 0.05}
    finder = LearningRateFinder(num_training_steps=20, **options) if as_callback else None
    run = trainer(tmp_path, ll.LoRACallback(rank=2), *([finder] if finder else []))
    found = None if as_callback else Tuner(run).lr_find(module, loader(size=128), num_training=20, **options)
    assert as_callback or 1e-4 <= found.suggestion() <= 0.05
    module.lr = 0.05
    run.fit(module, loader())
    after = frozen(module)
    assert all(torch.equal(before[n], after[n]) for n in before)
    if not as_callback:  # the search has left no trace in the updates
        assert torch.equal(outputs(module), outputs(plain))


def test_batch_size_finder(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 1

        def train_dataloader(self):
            return ll.ResumableLoader(loader().dataset, self.batch_size, shuffle=True)

        def val_dataloader(self):
            return loader()

    module, data = Owner(), Data()
    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    Tuner(run).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    assert data.batch_size == 4
    run.fit(module, datamodule=data)
    assert len(lora_layers(module)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True},
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"profiler": "simple"},
        {"limit_train_batches": 0},
    ],
    ids=lambda o: next(iter(o)),
)
def test_modes_of_the_trainer(options, tmp_path):
    module = Owner()
    before = frozen(module)
    settings = {"logger": None} if "barebones" in options else {}
    if "barebones" in options:
        run = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[ll.LoRACallback(rank=2)], barebones=True)
    else:
        run = trainer(tmp_path, ll.LoRACallback(rank=2), **options, **settings)
    run.fit(module, loader(), loader())
    after = frozen(module)
    assert all(torch.equal(before[n], after[n]) for n in before)
    trains = "limit_train_batches" not in options
    assert all(
        layer.lora["default"]["weight"].lora_B.any() == trains for layer in lora_layers(module).values()
    )


def test_lightning_cli_with_resume(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(
        f"""
        trainer:
          accelerator: cpu
          max_epochs: 1
          logger: false
          default_root_dir: {tmp_path}
          enable_progress_bar: false
          callbacks:
            - class_path: lora_lightning.LoRACallback
              init_args: {{rank: 2, target_modules: ["model.3"], checkpoint: adapter, adapter: scottish}}
            - class_path: lightning.pytorch.callbacks.ModelCheckpoint
              init_args: {{dirpath: {tmp_path}, filename: x}}
        """
    )

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return ll.ResumableLoader(loader().dataset, 4, shuffle=True)

    def cli(*words):
        monkeypatch.setattr(
            sys, "argv", ["train.py", "fit", "--config", str(tmp_path / "config.yaml"), *words]
        )
        return LightningCLI(Owner, Data, save_config_callback=None)

    assert set(lora_layers(cli("--model.lr=0.1").model)) == {"model.3"}
    module = cli("--trainer.max_epochs=2", f"--ckpt_path={tmp_path / 'x.ckpt'}").model
    assert ll.adapter_names(module) == ["scottish"]
    with pytest.raises(SystemExit):
        cli("--trainer.callbacks.init_args.rnk=2")


def test_fabric_and_a_plain_loop_train_the_same(tmp_path):
    """No Trainer: `inject`, an optimizer over what trains, `save_adapter`."""

    def train(model, step, optimizer, data):
        model.train()
        for x, y in data:
            optimizer.zero_grad()
            step(F.cross_entropy(model(x), y))
            optimizer.step()

    torch.manual_seed(0)
    base = cnn()
    ends = []
    for with_fabric in (False, True):
        network = copy.deepcopy(base)
        torch.manual_seed(1)
        ll.inject(network, ll.LoRAConfig(rank=2))
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.05)
        data = loader()
        if with_fabric:
            fabric = Fabric(accelerator="cpu", devices=1)
            model, optimizer = fabric.setup(network, optimizer)
            train(model, fabric.backward, optimizer, fabric.setup_dataloaders(data))
        else:
            train(network, lambda loss: loss.backward(), optimizer, data)
        ll.save_adapter(network, tmp_path / "adapter")
        fresh = copy.deepcopy(base)
        ll.load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(outputs(fresh), outputs(network))
        ends.append(outputs(network))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], outputs(base))
