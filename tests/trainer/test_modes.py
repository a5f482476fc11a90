"""Adapter-only checkpoints in every mode of saving, and the ways back from them."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from small import Classifier, cnn, loader, mlp, trainer

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers
from lora_lightning.trainer.checkpoint_io import WholeCheckpointIO


class Owner(Classifier):
    """Builds its own base, as a user's module does, and keeps hyperparameters."""

    def __init__(self, width: int = 3, lr: float = 0.05) -> None:
        torch.manual_seed(11)
        super().__init__(cnn(), lr)
        self.save_hyperparameters()
        self.width = width

    def predict_step(self, batch, index):
        return self(batch[0])


def trained(module):
    return {n for n, p in module.named_parameters() if p.requires_grad}


def held(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {n for n, t in state.items() if t.numel()}


def outputs(module):
    return module.eval()(torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    "options",
    [
        {"save_last": True},
        {"save_top_k": 2, "monitor": "val/loss"},
        {"every_n_train_steps": 2, "save_top_k": -1},
        {"save_weights_only": True, "save_last": True},
    ],
    ids=lambda o: ",".join(o),
)
def test_model_checkpoint(options, tmp_path):
    module = Owner()
    saver = ModelCheckpoint(tmp_path, **options)
    trainer(tmp_path, saver, ll.LoRACallback(rank=2)).fit(module, loader(), loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    assert all(held(file) == trained(module) for file in files)


@pytest.mark.parametrize("weights_only", [False, True])
def test_save_checkpoint(weights_only, tmp_path):
    module = Owner()
    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    assert held(tmp_path / "x.ckpt") == trained(module)


def test_on_exception_checkpoint_repeats_the_batch_that_failed(tmp_path):
    class Fails(Owner):
        fail, seen = True, []

        def training_step(self, batch, index):
            self.seen.append((self.current_epoch, index))
            if self.fail and self.seen[-1] == (1, 2):
                raise ZeroDivisionError
            return super().training_step(batch, index)

    def data():
        return ll.ResumableLoader(loader().dataset, 4, shuffle=True)

    straight = Owner()
    trainer(tmp_path, ll.LoRACallback(rank=2, dropout=0.1), max_epochs=3).fit(straight, data())
    torch.manual_seed(0)
    module = Fails()
    saver = OnExceptionCheckpoint(tmp_path)
    run = trainer(tmp_path, ll.LoRACallback(rank=2, dropout=0.1), saver, max_epochs=3)
    with pytest.raises(ZeroDivisionError):
        run.fit(module, data())
    assert held(saver.ckpt_path) == trained(module)
    Fails.fail = False
    fresh = Fails()
    run = trainer(tmp_path, ll.LoRACallback(rank=2, dropout=0.1), max_epochs=3)
    run.fit(fresh, data(), ckpt_path=saver.ckpt_path)
    assert Fails.seen[6:] == [(1, 2), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("plugin", [None, AsyncCheckpointIO])
def test_files_are_written_whole_without_asking(plugin, tmp_path):
    module = Owner()
    options = {"plugins": [plugin()]} if plugin else {}
    saver = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, saver, ll.LoRACallback(rank=2), **options)
    run.fit(module, loader())
    io = run.strategy.checkpoint_io
    assert isinstance(io.writer if plugin else io, WholeCheckpointIO)
    assert held(tmp_path / "last.ckpt") == trained(module)


def test_the_users_own_way_of_writing_stays(tmp_path):
    class Mine(TorchCheckpointIO):
        pass

    run = trainer(tmp_path, ll.LoRACallback(rank=2), plugins=[Mine()], fast_dev_run=True)
    run.fit(Owner(), loader())
    assert type(run.strategy.checkpoint_io) is Mine


@pytest.mark.parametrize(("saved", "loaded"), [("full", "adapter"), ("adapter", "full"), ("full", "full")])
def test_full_checkpoints_and_small_ones_resume_each_other(saved, loaded, tmp_path):
    module = Owner()
    run = trainer(tmp_path, ll.LoRACallback(rank=2, checkpoint=saved))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    whole = held(tmp_path / "x.ckpt") >= {n for n, _ in module.named_parameters()}
    assert whole == (saved == "full")
    fresh = Owner()
    run = trainer(tmp_path, ll.LoRACallback(rank=2, checkpoint=loaded))
    run.fit(fresh, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(outputs(fresh), outputs(module))
    assert torch.equal(outputs(ll.load_from_checkpoint(Owner, tmp_path / "x.ckpt")), outputs(module))
    with pytest.raises(ll.ConfigError, match=r"checkpoint='ful': give one of adapter, full. Did you mean"):
        ll.LoRACallback(checkpoint="ful")


@pytest.mark.parametrize("which", ["best", "last", "path"])
def test_test_validate_predict_by_name(which, tmp_path):
    module = Owner()
    saver = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    run = trainer(tmp_path, saver, ll.LoRACallback(rank=2), max_epochs=3)
    run.fit(module, loader(), loader())
    path = {"best": saver.best_model_path, "last": saver.last_model_path, "path": saver.last_model_path}[
        which
    ]
    wanted = ll.load_from_checkpoint(Owner, path)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    given = path if which == "path" else which
    run.test(module, loader(), ckpt_path=given, verbose=False)
    assert torch.equal(outputs(module), outputs(wanted))
    run.validate(module, loader(), ckpt_path=given, verbose=False)
    predictions = run.predict(module, loader(), ckpt_path=given)
    assert torch.equal(torch.cat(predictions), torch.cat([wanted.eval()(x) for x, _ in loader()]))


@pytest.mark.parametrize("weights_only", [False, True])
def test_load_from_checkpoint_builds_adapts_and_loads(weights_only, tmp_path):
    module = Owner(width=5, lr=0.1)
    saver = ModelCheckpoint(tmp_path / "a", save_weights_only=weights_only, filename="x")
    trainer(tmp_path, saver, ll.LoRACallback(rank=2, train_norm="both")).fit(module, loader())
    moved = (tmp_path / "a" / "x.ckpt").rename(tmp_path / "elsewhere.ckpt")
    loaded = ll.load_from_checkpoint(Owner, moved, lr=0.3)
    assert type(loaded) is Owner
    assert (loaded.width, loaded.lr) == (5, 0.3)
    assert torch.equal(outputs(loaded), outputs(module))
    assert trained(loaded) == trained(module)
    trainer(tmp_path, ll.LoRACallback(rank=2, train_norm="both")).fit(loaded, loader())


def test_load_from_checkpoint_of_something_else(tmp_path):
    run = trainer(tmp_path)
    run.fit(Owner(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ll.AdapterFileError, match=r"Use Owner.load_from_checkpoint\(path\)"):
        ll.load_from_checkpoint(Owner, tmp_path / "plain.ckpt")
    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    run.fit(Owner(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")

    class Other(Owner):
        def __init__(self, width: int = 3, lr: float = 0.05) -> None:
            super().__init__(width, lr)
            self.model = mlp()

    with pytest.raises(ll.AdapterFileError, match="does not fit this model"):
        ll.load_from_checkpoint(Other, tmp_path / "x.ckpt")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_an_adapters_checkpoint_in_a_module_without_the_callback(strict, weights_only, tmp_path):
    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    run.fit(Owner(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    plain = Owner()
    plain.strict_loading = strict
    says = "use LoRACallback or ll.load_from_checkpoint" if strict else "size mismatch for model.3.weight"
    with pytest.raises(RuntimeError, match=says):
        trainer(tmp_path).test(plain, loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    with pytest.raises(RuntimeError, match=says):
        Owner.load_from_checkpoint(tmp_path / "x.ckpt", strict=strict)


def test_a_state_dict_loads_by_hand_into_an_injected_network(tmp_path):
    module = Owner()
    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    network = Owner().model
    ll.inject(network, ll.LoRAConfig(rank=2))
    network.load_state_dict({n.removeprefix("model."): t for n, t in state.items()}, strict=False)
    assert torch.equal(outputs(network), outputs(module))


def test_the_stored_plan_comes_before_the_weights(tmp_path):
    """Ranks chosen from data are another plan by the same configuration: that of the file counts."""
    from dataclasses import replace

    from lora_lightning.adapters.inject import apply_plan

    config = ll.LoRAConfig(rank=2)
    module = Owner()
    planned = ll.plan(module, config)
    layers = [replace(planned.layers[0], rank=4), *planned.layers[1:]]
    apply_plan(module, config, replace(planned, layers=layers))
    run = trainer(tmp_path, ll.LoRACallback(config))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    fresh = Owner()
    callback = ll.LoRACallback(config)
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(fresh, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert [p.rank for p in callback.plan.layers] == [p.rank for p in layers]
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert all(id(p) in optimized for p in fresh.parameters() if p.requires_grad)
    assert lora_layers(fresh)["model.3"].lora["default"]["weight"].lora_A.shape[0] == 4
    assert torch.equal(outputs(ll.load_from_checkpoint(Owner, tmp_path / "x.ckpt")), outputs(module))


def test_optimizer_state_in_another_order_is_refused(tmp_path):
    class Turned(Owner):
        def configure_optimizers(self):
            return torch.optim.AdamW(list(self.parameters())[::-1], lr=self.lr)

    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    run.fit(Owner(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    run = trainer(tmp_path, ll.LoRACallback(rank=2), max_epochs=3)
    with pytest.raises(ll.AdapterFileError, match=r"parameter 0 was model.0.weight and is model.9"):
        run.fit(Turned(), loader(), ckpt_path=tmp_path / "x.ckpt")


def test_hyperparameters_that_are_not_plain_are_named(tmp_path):
    from functools import partial

    from omegaconf import OmegaConf

    class Hyper(Owner):
        def __init__(self, config=None, make=None, plain=(1, {"a": None})) -> None:
            super().__init__()
            self.save_hyperparameters()

    module = Hyper(OmegaConf.create({"a": 1}), partial(torch.optim.AdamW, lr=1e-3))
    run = trainer(tmp_path, ll.LoRACallback(rank=2))
    says = r"these hyperparameters of Hyper: config \(DictConfig\), make \(partial\). Keep plain values"
    with pytest.warns(UserWarning, match=says):
        run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ll.load_from_checkpoint(Hyper, tmp_path / "x.ckpt", weights_only=False)
    assert torch.equal(outputs(loaded), outputs(module))


def test_a_module_can_be_copied_and_pickled_after_a_fit(tmp_path):
    import pickle

    module = Owner()
    trainer(tmp_path, ll.LoRACallback(rank=2)).fit(module, loader())
    assert torch.equal(outputs(copy.deepcopy(module)), outputs(module))
    assert torch.equal(outputs(pickle.loads(pickle.dumps(module))), outputs(module))
