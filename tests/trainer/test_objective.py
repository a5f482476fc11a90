"""L + λ·R in a Trainer: the weights of a hand-written loss, however a step is computed; what is refused."""

import copy
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from small import Classifier, cnn, encoder, loader, mlp, pretrained, trainer, vit
from torch import nn
from torch.func import functional_call

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers
from lora_lightning.trainer import collapse
from lora_lightning.trainer.objective import Objective
from lora_lightning.trainer.speedups import Speedups

WEIGHTS = {"frobenius": 0.5, "l2": 0.02, "orthogonal": 0.1, "heads": 0.3, "outputs": 0.8}
CONFIG = {"rank": 2, "verbose": False}


class Plain(Classifier):
    def __init__(self, build=mlp, returns=lambda loss: loss) -> None:
        super().__init__(pretrained(build))
        self.returns = returns

    def training_step(self, batch, index):
        return self.returns(self.own(batch))

    def own(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByHand(Plain):
    """Its loss has the terms, of dense matrices and of a copy of the base."""

    def training_step(self, batch, index):
        logits = self(batch[0])
        layers = lora_layers(self).values()
        updates = [u for layer in layers for u in layer.updates("default")]
        terms = {
            "frobenius": sum((m.weight - m.base_weight("weight")).square().sum() for m in layers),
            "l2": sum(u.scaling / 2 * (u.lora_A.square().sum() + u.lora_B.square().sum()) for u in updates),
            "orthogonal": sum(
                2 * ((m[0] * m[1]).sum()) ** 2 for u in updates for m in (u.lora_A, u.lora_B.mT)
            ),
        }
        base = pretrained(mlp)
        head = dict(self.model[5].named_parameters())
        terms["heads"] = sum((p - q).square().sum() / 2 for p, q in zip(head.values(), base[5].parameters()))
        now = {f"5.{n}": p.detach() for n, p in head.items()}
        y = functional_call(base.requires_grad_(False), now, batch[0])
        terms["outputs"] = (logits.float() - y.float()).square().sum() / y.float().square().sum()
        return F.cross_entropy(logits, batch[1]) + sum(WEIGHTS[n] * terms[n] for n in WEIGHTS)


@pytest.fixture(autouse=True)
def _random_bases():
    warnings.filterwarnings("ignore", message="the frozen weights of .* look random")


def fit(tmp_path, module, weights=None, data=None, callbacks=(), config=CONFIG, **options):
    torch.manual_seed(3)
    callback = ll.LoRACallback(**config, **({"regularizer": weights} if weights else {}))
    run = trainer(tmp_path, callback, *callbacks, enable_checkpointing=False, **options)
    run.fit(module, data or loader(mlp))
    return run


def close(one, other, rtol=1e-4, atol=1e-6):
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    assert any("lora_B" in n and t.any() for n, t in one.items())
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=atol, msg=name)


def scaled():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


@pytest.mark.parametrize(
    ("returns", "options"),
    [
        (lambda loss: {"loss": loss, "more": 1}, {}),
        (lambda loss: loss, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}),
        (lambda loss: loss, {"precision": "bf16-mixed"}),
        (lambda loss: loss, {"plugins": scaled, "accumulate_grad_batches": 2}),
    ],
    ids=["dict", "accumulated and clipped", "bf16-mixed", "16-mixed with a scaler"],
)
def test_the_weights_are_those_of_the_loss_written_by_hand(returns, options, tmp_path):
    mixed = "precision" in options or "plugins" in options

    def given():
        return {n: v() if callable(v) else v for n, v in options.items()}

    module, by_hand = Plain(returns=returns), ByHand()
    fit(tmp_path, module, WEIGHTS, **given())
    fit(tmp_path, by_hand, **given())
    close(module, by_hand, *((2e-2, 2e-3) if mixed else ()))
    without = Plain()
    fit(tmp_path, without, **given())
    assert not torch.allclose(without.model[3].weight, module.model[3].weight, rtol=1e-2)


@pytest.mark.parametrize("build", [cnn, encoder, pytest.param(vit, marks=pytest.mark.slow)])
def test_outputs_of_the_base_are_those_with_the_adapters_off(build, tmp_path):
    """The term's value, where nothing else moves: and neither random numbers nor statistics are touched."""

    class Watched(Plain):
        def training_step(self, batch, index):
            logits = self(batch[0])
            self.eval()
            with ll.adapters_off(self), torch.no_grad():
                base = self.model(batch[0])
            self.train()
            self.wanted.append((logits.detach() - base).square().sum() / base.square().sum())
            return logits.pow(4).mean()

        def on_train_batch_end(self, *_):
            self.found.append(self.trainer.callback_metrics["regularizer/outputs"])

    module = Watched(build)
    module.wanted, module.found = [], []
    config = {**CONFIG, "modules_to_save": None, "target_modules": "all"}
    fit(tmp_path, module, {"outputs": 1e-3}, data=loader(build), config=config)
    assert module.found[0] < 1e-12 and module.found[-1] > 100 * module.found[0]
    torch.testing.assert_close(module.found, module.wanted)


class Noisy(Plain):
    """Drops, and moves the statistics of norms."""

    def __init__(self) -> None:
        super().__init__(
            lambda: nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, 3)
            )
        )


def test_the_base_draws_no_random_number_and_moves_no_statistics(tmp_path):
    config = {**CONFIG, "train_norm": "stats"}
    one, other = Noisy(), Noisy()
    fit(tmp_path, one, {"outputs": 1e-30}, config=config)
    fit(tmp_path, other, config=config)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    assert all(m.training for m in one.modules())


def test_a_new_head_is_no_distance(tmp_path):
    module = Plain()
    run = fit(tmp_path, module, {"outputs": 1.0}, config={**CONFIG, "target_modules": ["0"]}, max_epochs=1)
    with torch.no_grad():
        for parameter in ll.lora_parameters(module):
            parameter.zero_()
        module.model[5].weight.normal_()
    callback = ll.LoRACallback(**CONFIG, target_modules=["0"], regularizer={"outputs": 1.0})
    run = trainer(tmp_path, callback, max_steps=1)
    run.fit(module, loader(mlp))
    assert run.callback_metrics["regularizer/outputs"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["network", "in place", "module"])
def test_a_compiled_network_or_module_trains_the_same(how, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(Speedups, "backend", "eager")
    plain, module = Plain(), Plain()
    fit(tmp_path, plain, WEIGHTS)
    if how == "network":
        module.model = torch.compile(module.model, backend="eager")
    callbacks = [Speedups(compile=True)] if how == "in place" else []
    given = torch.compile(module, backend="eager") if how == "module" else module
    fit(tmp_path, given, WEIGHTS, callbacks=callbacks)
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(other, one)


def test_terms_are_logged_unweighted_and_what_is_added(tmp_path):
    metrics = fit(tmp_path, Plain(), {"frobenius": 0.5, "l2": 0.25}).callback_metrics
    names = {"regularizer/frobenius", "regularizer/l2", "regularizer/added"}
    assert {n for n in metrics if n.startswith("regularizer")} == names
    added = 0.5 * metrics["regularizer/frobenius"] + 0.25 * metrics["regularizer/l2"]
    torch.testing.assert_close(metrics["regularizer/added"], added)


def test_the_module_is_as_it_was_after_the_fit_and_after_an_error(tmp_path):
    module = Plain()
    fit(tmp_path, module, WEIGHTS)
    assert "training_step" not in module.__dict__
    assert module.model.__dict__.get("_compiled_call_impl") is None

    class Fails(pl.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, WEIGHTS, callbacks=[Fails()])
    assert "training_step" not in module.__dict__
    own = module.__dict__["training_step"] = module.training_step  # as torch.compile(module) puts it there
    fit(tmp_path, module, WEIGHTS)
    assert module.__dict__["training_step"] is own


def test_a_step_that_is_skipped_stays_so(tmp_path):
    class Skips(Plain):
        def training_step(self, batch, index):
            return None if index % 2 else super().training_step(batch, index)

    run = fit(tmp_path, Skips(), WEIGHTS, max_epochs=1)
    assert run.global_step == 4  # of which Lightning counts the skipped ones too
    assert "regularizer/added" in run.callback_metrics


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "weights", "says"),
    [
        (Manual, {"l2": 1.0}, r"automatic_optimization=False.*lora_lightning.regularization\(self\)"),
        (lambda: Plain(returns=lambda loss: loss), {"heads": 1.0}, "regularizer.heads: no head"),
    ],
)
def test_what_cannot_be_added_is_refused_before_training(module, weights, says, tmp_path):
    with pytest.raises(ll.ConfigError, match=says):
        fit(tmp_path, module(), weights, config={**CONFIG, "modules_to_save": None})


def test_strategies_that_shard_are_refused():
    run = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ll.ConfigError, match=r"FSDPStrategy cuts the updates up.*strategy=\"ddp\""):
        Objective(run, Plain(), {"l2": 1.0}, lambda loss: None)


class Parts(Plain):
    """Calls layers of its own, the second with what the first has made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def own(self, batch):
        return F.cross_entropy(self.second(self.first(batch[0])), batch[1])


class Around(Plain):
    def own(self, batch):
        return F.cross_entropy(self.model[5](self.model[:5](batch[0])), batch[1])


class Detector(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else {"boxes": y, "scores": y}


class Detects(Plain):
    def __init__(self) -> None:
        super().__init__(lambda: Detector(*mlp()))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Parts, "Linear is called with what another trained network has computed"),
        (Around, "the training step of Around calls no network"),
        (Detects, "has other outputs in eval mode than while it trains"),
    ],
)
def test_calls_without_outputs_of_the_base_are_refused_by_name(module, says, tmp_path):
    config = {**CONFIG, "target_modules": "all", "modules_to_save": None}
    with pytest.raises(ll.UserError, match=f"regularizer.outputs: .*{says}"):
        fit(tmp_path, module(), {"outputs": 1.0}, config=config)


def test_a_collapse_is_told_by_the_module_s_own_losses(tmp_path, monkeypatch):
    """What is added may grow as it likes."""
    seen = []
    look = classmethod(lambda cls, losses: seen.extend(losses) or cls(1.0, 0.0, 1.0))
    monkeypatch.setattr(collapse.Look, "of", look)

    class Still(Plain):
        def own(self, batch):
            return 1 + 0 * super().own(batch)

    data = loader(mlp, 4 * collapse.EVERY)
    added = fit(tmp_path, Still(), {"l2": 50.0}, data, max_epochs=1).callback_metrics["regularizer/added"]
    assert seen == [1.0] * collapse.EVERY and added > 1


def test_a_copy_of_the_module_has_a_step_of_its_own(tmp_path):
    class Copies(pl.Callback):
        def on_train_start(self, run, module):
            self.copy = copy.deepcopy(module)

    copies = Copies()
    fit(tmp_path, Plain(), {"frobenius": 1.0}, callbacks=[copies])
    step = copies.copy.__dict__["training_step"]
    assert step.__wrapped__.__self__ is copies.copy and step.func.__self__.module is copies.copy
