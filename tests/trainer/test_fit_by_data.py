"""Ranks and inits from the Trainer's own training data: decided before the fit, which then is as any
other."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from small import Classifier, cnn, loader, mlp, pretrained, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning as ll
from lora_lightning.adapters.state import update_of
from lora_lightning.app.inspect import inspect
from lora_lightning.errors import ConfigError, UserError


def with_dropout() -> nn.Module:
    return nn.Sequential(*cnn()[:6], nn.Dropout(0.3), *cnn()[6:])


class Busy(Classifier):
    """Its step logs, counts, keeps a running mean, and draws random numbers; its batches are changed on their
    way to the device."""

    def __init__(self) -> None:
        super().__init__(pretrained(with_dropout))
        self.register_buffer("mean", torch.zeros(()))
        self.steps, self.losses, self.lr = 0, [], 1e-3

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer.training
        x, y = batch
        return x + 0.1 * torch.randn_like(x), y

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("train/loss", loss)
        self.log_dict({"rate": self.optimizers().param_groups[0]["lr"]})
        self.mean.mul_(0.9).add_(loss.detach())
        self.steps += 1
        self.losses.append(float(loss))
        return loss


def shuffled(size: int = 16) -> DataLoader:
    return DataLoader(loader(size=size).dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(5))


def fit(tmp_path, module, data, *beside, ckpt_path=None, epochs=2, **options):
    callback = ll.LoRACallback(**{"rank": 2, "data_batches": 3, "verbose": False, **options})
    torch.manual_seed(3)
    run = trainer(tmp_path, callback, *beside, max_epochs=epochs, logger=CSVLogger(tmp_path))
    run.fit(module, data, ckpt_path=ckpt_path, weights_only=ckpt_path and True)
    return callback, run


def test_a_run_equals_one_with_the_decided_ranks_bit_for_bit(tmp_path):
    """Nothing of the look at the data stays: numbers, statistics, counters, the order of the data, logs."""
    module, data = Busy(), shuffled()
    auto, run = fit(tmp_path / "auto", module, data, rank="auto", budget=700)
    ranks = {layer.name: layer.rank for layer in auto.plan.layers}
    assert len(set(ranks.values())) > 1
    other, constant = Busy(), shuffled()
    _, plain = fit(tmp_path / "constant", other, constant, rank_pattern=ranks)
    assert module.steps == other.steps == 8 and module.losses == other.losses
    mine, theirs = module.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(data.generator.get_state(), constant.generator.get_state())
    assert run.logger.experiment.metrics == plain.logger.experiment.metrics


@pytest.mark.parametrize("init", ["eva", "lora_one"])
def test_updates_begin_as_the_batches_of_the_fit_say(init, tmp_path):
    """By an independent run over the very batches, without the Trainer."""
    data = loader()
    found: dict = {}

    class Keep(pl.Callback):
        def on_train_start(self, trainer, module):
            plan = module.lora_state.plan
            found.update(
                {p.name: update_of(module, p, "default").lora_A.detach().clone() for p in plan.layers}
            )

    fit(tmp_path, Classifier(), data, Keep(), init=init, data_batches=2)
    module = Classifier()
    with torch.random.fork_rng():
        ll.inject(
            module,
            ll.LoRAConfig(rank=2, init=init, data_batches=2),
            data=data,
            loss=lambda m, b: m.training_step(b, 0),
        )
    for layer in module.lora_state.plan.layers:
        torch.testing.assert_close(found[layer.name], update_of(module, layer, "default").lora_A.detach())


def test_a_resumed_run_takes_the_ranks_of_its_checkpoint_and_sees_no_data(tmp_path):
    module = Classifier()
    options = {"rank": "auto", "init": "eva"}
    first, run = fit(tmp_path / "one", module, loader(), **options)
    run.save_checkpoint(tmp_path / "x.ckpt")
    decided = first.plan
    steps = []

    class Counting(Classifier):
        def training_step(self, batch, index):
            steps.append(index)
            return super().training_step(batch, index)

    again, _ = fit(tmp_path / "two", Counting(), loader(), epochs=3, ckpt_path=tmp_path / "x.ckpt", **options)
    assert steps == [0, 1, 2, 3]
    assert again.plan == decided and again.plan.by_data == decided.by_data != ""
    assert [p.explained for p in again.plan.layers] == [p.explained for p in decided.layers]
    tested = Counting()
    one = trainer(tmp_path, ll.LoRACallback(**{"data_batches": 3, **options}))
    one.test(tested, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert len(steps) == 4
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in tested.state_dict().items())


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_without_a_fit_no_data_are_needed(stage, tmp_path):
    module = Classifier()
    data = DataLoader(loader().dataset.tensors[0], batch_size=4) if stage == "predict" else loader()
    getattr(trainer(tmp_path, ll.LoRACallback(rank="auto", init="eva")), stage)(module, data)
    assert "decided when" in module.lora_state.plan.by_data
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("lora_B"))


class Late(Classifier):
    """Builds its model and its data when the Trainer asks."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage):
        self.data = loader().dataset

    def configure_model(self):
        if isinstance(self.model, nn.Identity):
            self.model = pretrained(cnn)

    def train_dataloader(self):
        return DataLoader(self.data, 4)


@pytest.mark.slow
def test_models_and_data_that_are_built_late(tmp_path):
    late, _ = fit(tmp_path / "late", Late(), None, rank="auto", init="eva")
    early, _ = fit(tmp_path / "early", Classifier(), loader(), rank="auto", init="eva")
    assert late.plan == early.plan and "3 batches" in late.plan.by_data


class Manual(Classifier):
    """Two optimizers and steps of its own."""

    gives = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        first, second = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()
        return loss if self.gives else None

    def configure_optimizers(self):
        both = list(self.parameters())
        return [torch.optim.SGD(part, 0.01) for part in (both[::2], both[1::2])]


def test_manual_optimization(tmp_path):
    before = copy.deepcopy(pretrained(cnn).state_dict())
    module = Manual()
    fit(tmp_path, module, loader(), init="eva", epochs=1)
    frozen = {n.removeprefix("model."): p for n, p in module.named_parameters() if not p.requires_grad}
    assert all(torch.equal(before[n], p) for n, p in frozen.items())
    fit(tmp_path, Manual(), loader(), init="lora_one", epochs=1)
    silent = Manual()
    silent.gives = False
    with pytest.raises(
        UserError, match=r"init='lora_one': Manual\.training_step returns no loss.*return the loss"
    ):
        fit(tmp_path, silent, loader(), init="lora_one", epochs=1)


def test_what_cannot_be_is_told_in_one_message(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, index):
            raise KeyError("labels")

    with pytest.raises(
        UserError, match=r"rank='auto': Broken\.training_step, which is run before .*KeyError: 'labels'"
    ):
        fit(tmp_path, Broken(), loader(), rank="auto")
    module = Classifier()
    with pytest.raises(UserError, match=r"rank='auto': the training data are a generator.*a list of batches"):
        fit(tmp_path, module, (batch for batch in loader()), rank="auto")
    assert not hasattr(module, "lora_state") and all(p.requires_grad for p in module.parameters())
    with pytest.raises(
        ConfigError, match=r"budget=3.0: 2 layers of rank 1 take 204 parameters.*at least 204"
    ):
        fit(tmp_path, Classifier(), loader(), rank="auto", budget=3.0)


def test_a_fit_that_failed_before_is_none_the_wiser(tmp_path):
    class Failing(Late):
        fails = True

        def configure_model(self):
            super().configure_model()
            if self.fails:
                raise RuntimeError("no")

    module, callback = Failing(), ll.LoRACallback(rank=2, init="eva", verbose=False)
    run = trainer(tmp_path, callback, max_epochs=1)
    with pytest.raises(RuntimeError, match="no"):
        run.fit(module)
    module.fails = False
    run.fit(module)
    assert "4 batches" in callback.plan.by_data


def test_a_sampler_that_cannot_be_copied_is_refused(tmp_path):
    class Locked(torch.utils.data.RandomSampler):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a lock")

    data = loader().dataset
    with pytest.raises(UserError, match=r"the Locked of the training data cannot be copied.*a lock"):
        fit(tmp_path, Classifier(), DataLoader(data, 4, sampler=Locked(data)), init="eva")


def test_a_second_adapter_by_data_is_refused(tmp_path):
    module = Classifier()
    fit(tmp_path, module, loader(), init="eva", epochs=1)
    with pytest.raises(ConfigError, match=r"init='eva': decided by data on a model that is not adapted yet"):
        ll.add_adapter(module, "other")


def test_loggers_are_told_the_ranks(tmp_path):
    callback, _ = fit(tmp_path, Classifier(), loader(), rank="auto")
    told = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    for layer in callback.plan.layers:
        assert f"{layer.name.replace('.', '/')}: {layer.rank}" in told
    assert "by the inputs of the layers in 3 batches" in told


@pytest.mark.slow
def test_workers_are_left_alone(tmp_path):
    """A loader with workers that stay gives the fit what it would have."""
    data = DataLoader(TensorDataset(*loader().dataset.tensors), 4, num_workers=1, persistent_workers=True)
    module = Busy()
    fit(tmp_path / "auto", module, data, rank="auto", epochs=1)
    other = Busy()
    ranks = {layer.name: layer.rank for layer in module.lora_state.plan.layers}
    fit(tmp_path / "constant", other, DataLoader(loader().dataset, 4), rank_pattern=ranks, epochs=1)
    assert module.losses == other.losses


def test_strategies_that_shard_are_refused_by_name(tmp_path):
    callback = ll.LoRACallback(rank="auto")
    run = trainer(tmp_path, callback)
    run.state.fn = "fit"
    run.strategy.__class__ = type("FSDPStrategy", (pl.strategies.Strategy,), {"__module__": "lightning.x"})
    with pytest.raises(
        UserError, match=r"rank='auto': decided by data .* FSDPStrategy shards: .*rank_pattern"
    ):
        callback.setup(run, Classifier(), "fit")


@pytest.mark.parametrize(
    "precision", ["bf16-true", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16-mixed", "16-mixed"))]
)
def test_half_precision(precision, tmp_path):
    """Decided as in float32, to what half precision can tell."""
    plans = {}
    for name in ("32-true", precision):
        callback = ll.LoRACallback(rank=2, init="eva", verbose=False)
        module = Classifier()
        run = trainer(tmp_path, callback, precision=name, max_steps=0)
        run.fit(module, loader())
        plans[name] = [update_of(module, p, "default").lora_A.detach() for p in callback.plan.layers]
    for ours, wanted in zip(plans[precision], plans["32-true"], strict=True):
        assert ours.dtype == torch.float32
        assert torch.linalg.matrix_norm(ours.flatten(1) @ wanted.flatten(1).T) ** 2 > 1.99


def test_files_hold_the_ranks_and_need_no_data_again(tmp_path):
    module, data = Classifier(pretrained(mlp)), loader(mlp)
    callback, _ = fit(tmp_path, module, data, rank="auto", init="eva", budget=300, epochs=1)
    x = data.dataset.tensors[0]
    module.eval()
    for kind in ("lora_lightning", "peft"):
        ll.save_adapter(module, tmp_path / kind, format=kind)
        other = Classifier(pretrained(mlp)).eval()
        ll.load_adapter(other, tmp_path / kind)
        torch.testing.assert_close(other(x), module(x))
    about = (tmp_path / "peft" / "adapter_config.json").read_text()
    assert "rank_pattern" in about and '"init_lora_weights": true' in about
    other = Classifier(pretrained(mlp)).eval()
    ll.load_adapter(other, tmp_path / "lora_lightning")
    assert other.lora_state.plan == callback.plan and other.lora_state.plan.by_data == callback.plan.by_data
    assert callback.plan.by_data in inspect(tmp_path / "lora_lightning")
