"""Base weights that a LightningModule's own hooks bring, after the callback's setup."""

import copy

import pytest
import torch
from small import Classifier, loader, mlp, trainer

import lora_lightning as ll


class Late(Classifier):
    """Gives its network other weights in one of its hooks, and another way each time."""

    def __init__(self, way: str) -> None:
        super().__init__(mlp())
        self.way, self.other = way, [mlp()]

    def arrive(self) -> None:
        other = self.other[0]
        if self.way in ("load", "loose"):
            self.model.load_state_dict(other.state_dict(), strict=self.way == "load")
        elif self.way == "copy":
            for module, source in zip(self.model.children(), other.children(), strict=True):
                if isinstance(module, torch.nn.Linear):
                    module.weight.data.copy_(source.weight)
                    module.bias.data.copy_(source.bias)
        elif self.way == "head":
            self.model[-1].weight.data.copy_(other[-1].weight)
            self.other = [copy.deepcopy(self.model)]
        else:
            self.model = copy.deepcopy(other)


class InSetup(Late):
    def setup(self, stage: str) -> None:
        self.arrive()


class InConfigureModel(Late):
    def configure_model(self) -> None:
        if not hasattr(self, "done"):
            self.arrive()
        self.done = True


class InFitStart(Late):
    def on_fit_start(self) -> None:
        if self.way == "head":
            self.arrive()
            return
        self.arrive()


@pytest.mark.parametrize(
    ("module", "way"),
    [
        *[(InSetup, way) for way in ("load", "loose", "copy", "replace")],
        *[(InConfigureModel, way) for way in ("load", "copy", "replace")],
        (InFitStart, "loose"),
        (InFitStart, "head"),
    ],
)
def test_the_base_is_what_arrived(module, way, tmp_path):
    torch.manual_seed(0)
    module, x = module(way), torch.randn(6, *loader(mlp).dataset.tensors[0].shape[1:])
    seen = []
    module.on_train_start = lambda: seen.append((module.model(x).detach(), module.other[0](x).detach()))
    callback = ll.LoRACallback(rank=2, use_dora=True, verbose=False)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader(mlp))
    (start, expected), *_ = seen
    assert torch.allclose(start, expected, atol=1e-6)
    assert not torch.allclose(module.model(x), expected, atol=1e-3)
    with ll.adapters_off(module):
        assert torch.allclose(module.model(x), expected, atol=1e-6)
    ll.add_adapter(module, "new")
    ll.set_adapter(module, "new")
    assert torch.allclose(module.model(x), expected, atol=1e-6)
    ll.eject(module)
    assert torch.allclose(module.model(x), expected, atol=1e-6)


@pytest.mark.parametrize("module", [Late, InSetup, InConfigureModel])
def test_a_resumed_head_is_no_base_value(module, tmp_path):
    torch.manual_seed(0)
    first, x = module("load"), torch.randn(6, *loader(mlp).dataset.tensors[0].shape[1:])
    resumed = copy.deepcopy(first)
    base = copy.deepcopy(first.model if module is Late else first.other[0])
    run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), max_epochs=1)
    run.fit(first, loader(mlp))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), max_epochs=2)
    again.fit(resumed, loader(mlp), ckpt_path=tmp_path / "x.ckpt")
    assert not torch.allclose(resumed.model(x), base(x), atol=1e-3)
    with ll.adapters_off(resumed):
        assert torch.allclose(resumed.model(x), base(x), atol=1e-6)


def test_a_linear_probe_comes_back_with_its_base(tmp_path):
    """Its checkpoints hold no update by which they could be told from a plain model's."""
    torch.manual_seed(0)
    module = Classifier(mlp())
    base, x = copy.deepcopy(module.model), torch.randn(6, *loader(mlp).dataset.tensors[0].shape[1:])
    resumed, other = Classifier(copy.deepcopy(base)), mlp()
    for one in (module, resumed):
        ll.linear_probe(one)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader(mlp))
    run.save_checkpoint(tmp_path / "x.ckpt")
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(mlp), ckpt_path=tmp_path / "x.ckpt")
    with ll.adapters_off(resumed):
        assert torch.equal(resumed.model(x), base(x))
    resumed.model.load_state_dict(other.state_dict())  # another base
    with ll.adapters_off(resumed):
        assert torch.equal(resumed.model(x), other(x))


def test_what_is_replaced_too_late_is_said_before_training(tmp_path):
    class TooLate(Classifier):
        def configure_optimizers(self):  # after the injection
            self.model[-1] = torch.nn.Linear(*reversed(self.model[-1].weight.shape))
            return super().configure_optimizers()

    module = TooLate(mlp())
    with pytest.raises(ll.UserError, match="another module, or a weight of another shape, was put here"):
        trainer(tmp_path, ll.LoRACallback(rank=2)).fit(module, loader(mlp))
