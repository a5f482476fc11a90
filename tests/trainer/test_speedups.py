"""Speedups change how a network computes and not what: the same weights after training, fewer bytes kept."""

import lightning.pytorch as pl
import pytest
import torch
from small import Classifier, cnn, encoder, loader, mlp, pretrained, trainer, vit
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import lora_lightning as ll
from lora_lightning.trainer.speedups import Speedups


class Looks(pl.Callback):
    """Bytes that a training step keeps for its backward; what flows through the convolutions."""

    def __init__(self) -> None:
        self.bytes, self.last, self.compiled = 0, [], []
        self.hooks = saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x):
        self.bytes += x.numel() * x.element_size() * (not isinstance(x, nn.Parameter))
        return x

    def on_train_start(self, trainer, module) -> None:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(self.sees)

    def sees(self, layer, inputs, output) -> None:
        if output.shape[1] > 1 and output.shape[2] > 1:
            self.last.append(
                all(x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))
            )

    def on_train_batch_start(self, trainer, module, *args) -> None:
        self.hooks.__enter__()
        self.compiled.append(module.model._compiled_call_impl is not None)

    def on_before_backward(self, *args) -> None:
        self.hooks.__exit__()


class Owner(Classifier):
    def __init__(self, build) -> None:
        super().__init__(pretrained(build), 0.05)

    def configure_optimizers(self):
        """Adam's first steps are as large for the noise of a zero gradient."""
        return torch.optim.SGD(self.parameters(), self.lr)


def fit(folder, build, lora=True, looks=None, dropout=0.0, **options):
    torch.manual_seed(0)
    module = Owner(build)
    names = list(module.state_dict())
    adapting = [ll.LoRACallback(rank=2, verbose=False, dropout=dropout)] if lora else []
    callbacks = [Speedups(**options), *adapting, *([looks] if looks else [])]
    run = trainer(folder, *callbacks, max_epochs=1, enable_checkpointing=False)
    run.fit(module, loader(cnn if build is stages else build))
    if not lora:
        assert list(module.state_dict()) == names
    return module


def same(one, other, rtol=1e-5):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("build", [vit, cnn])
def test_gradient_checkpointing_keeps_fewer_bytes_and_changes_nothing(build, lora, tmp_path):
    """Also the running statistics of norms that move, which a second forward would move again."""
    deep = build if build is vit else stages
    few, many = Looks(), Looks()
    plain = fit(tmp_path, deep, lora, many, dropout=0.1)
    module = fit(tmp_path, deep, lora, few, dropout=0.1, gradient_checkpointing=True)
    same(module, plain, rtol=1e-6)
    assert few.bytes < (0.8 if lora else 0.6) * many.bytes
    assert not any("forward" in m.__dict__ for m in module.modules())
    assert not getattr(module.model, "grad_checkpointing", False)


def stages() -> nn.Module:
    def block() -> nn.Module:
        layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU())

    first = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(
        first, nn.Sequential(block(), block()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("lora", [True, False])
def test_channels_last_all_the_way_and_back(lora, tmp_path):
    looks = Looks()
    plain = fit(tmp_path, cnn, lora)
    module = fit(tmp_path, cnn, lora, looks, channels_last=True)
    assert looks.last and all(looks.last)
    same(module, plain, rtol=1e-4)
    assert all(p.is_contiguous() for p in module.parameters())


@pytest.mark.parametrize(
    ("build", "lora"), [(mlp, False), (mlp, True), pytest.param(vit, True, marks=pytest.mark.slow)]
)
def test_compiled_in_place_while_it_trains(build, lora, tmp_path, monkeypatch):
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(Speedups, "backend", staticmethod(backend))
    looks = Looks()
    plain = fit(tmp_path, build, lora)
    module = fit(tmp_path, build, lora, looks, compile=True)
    assert all(looks.compiled) and seen
    assert module.model._compiled_call_impl is None
    same(module, plain)


@pytest.mark.slow
def test_all_at_once_after_lora_in_the_list(tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(Speedups, "backend", "eager")
    torch.manual_seed(0)
    module = Owner(stages)
    speedups = Speedups(channels_last=True, compile=True, gradient_checkpointing=True)
    run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), speedups, max_epochs=1)
    run.fit(module, loader(cnn))
    same(module, fit(tmp_path, stages), rtol=1e-4)


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(ll.ConfigError, match="compile='fast': give true, false, or a mode"):
        Speedups(compile="fast")
    with pytest.raises(ll.ConfigError, match="no blocks are found in Sequential"):
        fit(tmp_path, cnn, gradient_checkpointing=True)


def test_an_encoder_of_torch_by_its_layers(tmp_path):
    from lora_lightning.trainer.recompute import recompute_blocks

    model = encoder()
    undo = recompute_blocks(model)
    assert [name for name, m in model.named_modules() if "forward" in m.__dict__] == ["layers.0", "layers.1"]
    for take_back in undo:
        take_back()
    assert not any("forward" in m.__dict__ for m in model.modules())
