"""LoRACallback in a real Trainer: when it injects, what its checkpoints hold, how they come back."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Classifier, cnn, loader, mlp, save_checkpoint, trainer, vit
from timm.layers import BatchNormAct2d
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


def fit(tmp_path, module, *callbacks, data=None, **options):
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(module, data or loader())
    return run


@pytest.mark.parametrize("build", [mlp, cnn, vit])
def test_a_fit_trains_updates_and_head_and_nothing_else(build, tmp_path):
    module = Classifier(build())
    base = {n: t.clone() for n, t in module.model.state_dict().items()}
    callback = ll.LoRACallback(rank=2)
    fit(tmp_path, module, callback, data=loader(build))
    heads = tuple(h.removeprefix("model.") for h in callback.plan.heads)
    state = module.model.state_dict()
    for name, before in base.items():
        assert torch.equal(state[name], before) != name.startswith(heads), name
    assert all(layer.lora["default"]["weight"].lora_B.any() for layer in lora_layers(module).values())


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_what_was_trained_and_no_more(weights_only, tmp_path):
    module = Classifier(vit())
    saver = ModelCheckpoint(tmp_path / "ckpt", save_weights_only=weights_only, save_last=True)
    fit(tmp_path, module, saver, ll.LoRACallback(rank=2), data=loader(vit))
    checkpoint = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n for n, t in checkpoint["state_dict"].items() if t.numel()} == trained
    if not weights_only:
        optimizer = checkpoint["optimizer_states"][0]
        assert len(optimizer["state"]) == len(trained)


def test_the_norms_that_move_are_kept(tmp_path):
    module = Classifier()
    run = fit(tmp_path, module, ll.LoRACallback(rank=2, train_norm="both"))
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {"model.1.running_mean", "model.1.weight", "model.4.running_var"} <= set(state)
    assert "model.0.weight" not in state


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"train_norm": "both"}])
def test_a_fresh_module_takes_the_checkpoint(options, tmp_path):
    torch.manual_seed(3)
    base = cnn()
    module = Classifier(copy.deepcopy(base))
    run = fit(tmp_path, module, ll.LoRACallback(rank=2, **options))
    run.save_checkpoint(tmp_path / "x.ckpt")
    fresh = Classifier(copy.deepcopy(base))
    other = trainer(tmp_path, ll.LoRACallback(rank=2, **options))
    result = other.test(fresh, loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert result == run.test(module, loader(), verbose=False)
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_best_is_restored_by_name(tmp_path):
    module = Classifier()
    saver = ModelCheckpoint(tmp_path, monitor="val/loss", filename="{epoch}")
    run = trainer(tmp_path, saver, ll.LoRACallback(rank=2), max_epochs=3)
    run.fit(module, loader(), loader(size=8))
    best = run.test(module, loader(size=8), ckpt_path="best", verbose=False)[0]["test/loss"]
    assert best == pytest.approx(float(saver.best_model_score))


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path):
    whole = Classifier(vit())
    base = copy.deepcopy(whole.model)
    torch.manual_seed(4)
    fit(tmp_path, whole, ll.LoRACallback(rank=2), data=loader(vit), max_epochs=4)
    half = Classifier(copy.deepcopy(base))
    torch.manual_seed(4)
    run = fit(tmp_path, half, ll.LoRACallback(rank=2), data=loader(vit), max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Classifier(copy.deepcopy(base))
    run = trainer(tmp_path, ll.LoRACallback(rank=2), max_epochs=4)
    run.fit(resumed, loader(vit), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_ranks_and_plain_checkpoints_are_refused(tmp_path):
    run = fit(tmp_path, Classifier(), ll.LoRACallback(rank=2), max_epochs=1)
    run.save_checkpoint(tmp_path / "lora.ckpt")
    run = fit(tmp_path, Classifier(), max_epochs=1)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    for name, says in [("lora.ckpt", "Give LoRA the rank"), ("plain.ckpt", "lacks 4 of the model's 4 LoRA")]:
        for strict in (True, False):
            module = Classifier()
            module.strict_loading = strict
            with pytest.raises(ll.AdapterFileError, match=says):
                trainer(tmp_path, ll.LoRACallback(rank=3)).test(
                    module, loader(), ckpt_path=tmp_path / name, verbose=False
                )


def test_a_missing_head_or_buffer_is_not_forgiven(tmp_path):
    run = fit(tmp_path, Classifier(), ll.LoRACallback(rank=2, train_norm="both"), max_epochs=1)
    run.save_checkpoint(tmp_path / "x.ckpt")
    for missing in ("model.9.weight", "model.1.running_mean"):
        checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
        del checkpoint["state_dict"][missing]
        save_checkpoint(checkpoint, tmp_path / "y.ckpt")
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
            trainer(tmp_path, ll.LoRACallback(rank=2, train_norm="both")).test(
                Classifier(), loader(), ckpt_path=tmp_path / "y.ckpt", verbose=False
            )


def test_missing_updates_are_not_forgiven_where_loading_is_not_strict(tmp_path):
    module = fit(tmp_path, Classifier(), ll.LoRACallback(rank=2), max_epochs=1).lightning_module
    state = {n: t for n, t in module.state_dict().items() if not n.endswith("lora_B")}
    with pytest.raises(ll.AdapterFileError, match="lacks 2 of the model's 4 LoRA tensors"):
        module.load_state_dict(state, strict=False)


class Late(Classifier):
    """Builds its network in `where`, as modules for sharded training do."""

    def __init__(self, where: str) -> None:
        super().__init__(nn.Identity())
        self.where = where

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")

    def _build(self, where: str) -> None:
        if self.where == where and isinstance(self.model, nn.Identity):
            torch.manual_seed(0)
            self.model = cnn()


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_layers_built_late_are_adapted(where, tmp_path):
    module = Late(where)
    run = fit(tmp_path, module, ll.LoRACallback(rank=2))
    assert len(lora_layers(module)) == 2
    run.save_checkpoint(tmp_path / "x.ckpt")
    fresh = Late(where)
    trainer(tmp_path, ll.LoRACallback(rank=2)).test(
        fresh, loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_layers_that_come_on_top_of_others_are_adapted_too(tmp_path):
    class Grows(Classifier):
        def configure_model(self) -> None:
            if not hasattr(self, "extra"):
                self.extra = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

        def forward(self, x):
            return self.extra(self.model(x))

    module = Grows()
    callback = ll.LoRACallback(rank=2, target_modules="all", modules_to_save=["extra.1"])
    fit(tmp_path, module, callback)
    assert set(lora_layers(module)) == {"model.0", "model.3", "model.6", "model.9", "extra.0"}


def test_setup_again_changes_nothing_and_another_configuration_is_refused(tmp_path):
    module = Classifier()
    callback = ll.LoRACallback(rank=2)
    run = fit(tmp_path, module, callback)
    layers = lora_layers(module)
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    fit(tmp_path, module, ll.LoRACallback(rank=2))
    assert all(layer is layers[n] for n, layer in lora_layers(module).items())
    with pytest.raises(ll.ConfigError, match=r"eject\(model\)"):
        fit(tmp_path, module, ll.LoRACallback(rank=3))
    ll.eject(module)
    fit(tmp_path, module, ll.LoRACallback(rank=3))


def test_nothing_to_adapt_is_an_error_before_any_training(tmp_path):
    module = Classifier()
    with pytest.raises(ll.ConfigError, match="'qkv' matches no layer"):
        fit(tmp_path, module, ll.LoRACallback(target_modules=["qkv"]))
    assert all(p.requires_grad for p in module.parameters())


def test_an_optimizer_without_the_updates_is_refused(tmp_path):
    class Early(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.chosen = list(self.model.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.chosen, lr=0.1)

    with pytest.raises(ll.UserError, match="configure_optimizers"):
        fit(tmp_path, Early(), ll.LoRACallback(rank=2))


def test_bad_options_are_found_at_construction():
    with pytest.raises(ll.ConfigError, match=r"rnk=8 is not an option.*Did you mean 'rank'"):
        ll.LoRACallback(rnk=8)
    with pytest.raises(ll.ConfigError, match="verify_strict='yes': give true or false"):
        ll.LoRACallback(verify_strict="yes")
    with pytest.raises(ll.ConfigError, match="give one of the two"):
        ll.LoRACallback(ll.LoRAConfig(), rank=8)


def test_the_backbone_attribute_is_what_is_adapted(tmp_path):
    class Detector(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.backbone = cnn()
            self.neck = nn.Linear(3, 3)

        def forward(self, x):
            return self.neck(self.backbone(x))

    module = Detector()
    run = fit(tmp_path, module, ll.LoRACallback(rank=2))
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {"neck.weight", "neck.bias", "backbone.9.weight"} <= set(state)
    assert "backbone.0.weight" not in state


def test_frozen_batchnorm_stays_in_eval_through_the_trainer(tmp_path):
    class Watch(pl.Callback):
        modes: set = set()

        def on_train_batch_start(self, trainer, pl_module, batch, index):
            self.modes |= {m.training for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)}

    module = Classifier()
    before = {n: b.clone() for n, b in module.named_buffers()}
    run = trainer(tmp_path, Watch(), ll.LoRACallback(rank=2))
    run.fit(module, loader(), loader())
    assert Watch.modes == {False}
    assert all(torch.equal(before[n], b) for n, b in module.named_buffers())


def test_no_warning_of_eval_mode_for_what_is_meant_and_one_for_the_rest(tmp_path, recwarn):
    module = Classifier()
    module.model[1] = BatchNormAct2d(module.model[1].num_features)  # which holds an activation
    fit(tmp_path, module, ll.LoRACallback(rank=2))
    assert not any("eval mode" in str(w.message) for w in recwarn)
    module = Classifier()
    module.model[2].eval()
    with pytest.warns(UserWarning, match="3 module.s. in eval mode"):
        fit(tmp_path, module, ll.LoRACallback(rank=2))


def test_state_dict_of_submodules_and_of_an_ejected_module_is_whole(tmp_path):
    module = Classifier()
    names = set(module.model.state_dict())
    fit(tmp_path, module, ll.LoRACallback(rank=2))
    assert names <= set(module.model.state_dict())
    assert not names <= {n.removeprefix("model.") for n in module.state_dict()}
    ll.eject(module)
    assert names == {n.removeprefix("model.") for n in module.state_dict()}
    assert names == set(copy.deepcopy(module).model.state_dict())
