"""The check of the first training steps: it names what is not used, and nothing in a sound model."""

import warnings

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from small import Classifier, loader, mlp, trainer
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.verify import gradient_peaks
from lora_lightning.trainer import first_steps
from lora_lightning.trainer.first_steps import GradientMonitor

OPTIONS = {"rank": 2, "target_modules": "all", "modules_to_save": None}


class Branches(nn.Module):
    """Beside the path to the loss: a layer never called, one detached, one behind a gate of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.detached, self.gated = (nn.Linear(6, 3) for _ in range(4))

    def forward(self, x):
        return self.used(x) + self.detached(x).detach() + 0 * self.gated(x)


def fit(tmp_path, model, data=None, module=None, options=OPTIONS, strict=False, **settings):
    """Returns the warnings of the check."""
    callback = ll.LoRACallback(**options, verify_strict=strict, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, **settings).fit(module or Classifier(model), data or loader(mlp, 32))
    assert callback._first_steps is None
    return [str(w.message) for w in caught if "adapted layers got" in str(w.message)]


def test_what_is_not_used_is_named_once_with_its_reason(tmp_path):
    unused, zero = fit(tmp_path, Branches())
    assert unused.startswith(
        "2 of 4 adapted layers got no gradient in the first 5 training steps: model.spare, model.detached. "
    )
    assert "never called" in unused and "LayerDrop" in unused and "detached" in unused
    assert zero.startswith(
        "1 of 4 adapted layers got a gradient of zero alone in the first 5 training steps: model.gated. "
    )


@pytest.mark.parametrize("terms", [{"frobenius": 1.0, "l2": 1.0, "orthogonal": 1.0}, {"outputs": 1.0}])
def test_terms_of_the_weights_which_give_all_of_them_a_gradient_hide_nothing(terms, tmp_path):
    assert fit(tmp_path, Branches(), options={**OPTIONS, "regularizer": terms}) == fit(tmp_path, Branches())
    assert fit(tmp_path, mlp(), strict=True, options={**OPTIONS, "regularizer": terms}) == []


def test_strict_makes_it_one_error_with_every_name(tmp_path):
    with pytest.raises(ll.UserError, match=r"(?s)model.spare, model.detached.*model.gated.*verify_strict"):
        fit(tmp_path, Branches(), strict=True)


def test_a_sound_model_gets_no_warning(tmp_path):
    assert fit(tmp_path, mlp(), strict=True) == []


def test_fewer_steps_than_are_watched_are_reported_at_the_end(tmp_path):
    (unused, _) = fit(tmp_path, Branches(), max_steps=2)
    assert "in the first 2 training steps" in unused


def test_accumulated_steps_are_watched_too(tmp_path):
    assert len(fit(tmp_path, Branches(), accumulate_grad_batches=4)) == 2


class Skips(nn.Module):
    """LayerDrop: each layer is used in every third step only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.step = -1

    def forward(self, x):
        self.step += 1
        return self.layers[self.step % 3](x)


def test_a_layer_that_is_used_in_some_steps_is_alive(tmp_path):
    assert fit(tmp_path, Skips(), strict=True) == []
    (message,) = fit(tmp_path, Skips(), max_steps=2)
    assert "1 of 3 adapted layers got no gradient in the first 2 training steps: model.layers.2." in message


def test_a_gate_that_opens_by_training_is_alive(tmp_path):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.gate = mlp(), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.gate * self.backbone(x)

    module = Classifier(Gated())
    assert fit(tmp_path, None, module=module, options={**OPTIONS, "backbone": "model.backbone"}) == []


class Overflows(Classifier):
    """Its loss is not finite from the third step on."""

    def training_step(self, batch, index):
        return super().training_step(batch, index) * (1 if index < 2 else float("inf"))


def test_a_gradient_that_is_not_finite_is_named_though_the_layer_was_alive_before(tmp_path):
    (message,) = fit(tmp_path, None, module=Overflows(mlp()))
    assert message.startswith("3 of 3 adapted layers got a gradient with NaN or infinity in the first 5")
    assert "learning rate" in message
    with pytest.raises(ll.UserError, match="NaN or infinity"):
        fit(tmp_path, None, module=Overflows(mlp()), strict=True)


def test_the_steps_that_a_grad_scaler_skips_are_normal(tmp_path):
    seen = []

    class Watched(Classifier):
        def on_after_backward(self):
            seen.extend(peak for peak in gradient_peaks(self).values())

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    assert fit(tmp_path, None, module=Watched(mlp()), strict=True, plugins=[plugin], max_steps=6) == []
    assert not all(torch.tensor(seen).isfinite())


def test_manual_optimization_with_two_optimizers(tmp_path):
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.other, self.spare = mlp(), nn.Linear(6, 3)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizers = self.optimizers()
            one = index % 2
            self.toggle_optimizer(optimizers[one])
            logits = (self.other if one else self.model)(batch[0])
            optimizers[one].zero_grad()
            self.manual_backward(nn.functional.cross_entropy(logits, batch[1]))
            optimizers[one].step()
            self.untoggle_optimizer(optimizers[one])

        def configure_optimizers(self):
            others = [*self.other.parameters(), *self.spare.parameters()]
            return [torch.optim.SGD(p, lr=0.1) for p in (self.model.parameters(), others)]

    (message,) = fit(tmp_path, None, module=Manual())
    assert "1 of 7 adapted layers got no gradient in the first 5 training steps: spare." in message


def test_five_steps_are_looked_at_and_no_more(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(first_steps, "gradient_peaks", lambda model, reached: looks.append(1) or {"0": 1.0})
    assert fit(tmp_path, mlp(), max_epochs=2) == []  # 16 steps
    assert len(looks) == 5


def test_merged_updates_do_not_train_and_are_named():
    model = mlp()
    ll.inject(model, ll.LoRAConfig(**OPTIONS))
    model.requires_grad_(True)
    ll.merge(model)
    watch = GradientMonitor(model)
    model(torch.randn(2, 6)).sum().backward()
    watch.after_backward()
    watch.after_step()
    assert (
        "3 of 3 adapted layers got no gradient in the first 1 training steps: 0, 3, 5." in watch.faults()[0]
    )


def test_parts_of_a_weight_are_named_each():
    model = nn.MultiheadAttention(8, 2)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["in_proj.q", "in_proj.v"], modules_to_save=None))
    x = torch.randn(3, 1, 8)
    model(x, x, x)[0].sum().backward()
    assert set(gradient_peaks(model)) == {"in_proj.q", "in_proj.v"}
    assert gradient_peaks(model)["in_proj.v"] > 0
