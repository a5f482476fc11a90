"""Low rank beside chosen layers in full: "auto" and names together, every family, files, resume, adapters."""

import pytest
import torch
from families import CASES, base_model, equal, loss, run, typical_cases
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Classifier, loader, trainer, vit
from torch import nn

import lora_lightning as ll


@pytest.mark.parametrize(
    ("saved", "heads"),
    [
        (["auto", "blocks.1"], ["blocks.1", "head"]),
        (["blocks.1", "norm", "auto"], ["blocks.1", "norm", "head"]),
        (["auto"], ["head"]),
        (["blocks.1.*", "blocks.1"], ["blocks.1"]),  # what lies in another one goes with it
        (["blocks.?.mlp"], ["blocks.0.mlp", "blocks.1.mlp"]),
    ],
)
def test_auto_in_a_list_is_the_head(saved, heads):
    model = vit()
    planned = ll.inject(model, ll.LoRAConfig(rank=2, modules_to_save=saved))
    assert planned.heads == heads
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n}
    assert trained == {n for n, _ in vit().named_parameters() if n.startswith(tuple(f"{h}." for h in heads))}
    assert not any(layer.name.startswith(tuple(f"{h}." for h in heads)) for layer in planned.layers)


def test_auto_is_no_more_than_a_word_where_no_head_is_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    assert ll.plan(model, ll.LoRAConfig(target_modules=["0"], modules_to_save=["auto", "2"])).heads == ["2"]


@pytest.mark.parametrize("targets", [["blocks.1.attn.qkv", "fc1"], "head", ["auto", "head"]])
def test_a_layer_is_adapted_or_trained_in_full(targets):
    """Named in both it is refused by name; of a pattern with other layers the others are adapted."""
    config = ll.LoRAConfig(target_modules=targets, modules_to_save=["auto", "blocks.1"])
    with pytest.raises(ll.ConfigError, match="modules_to_save, and trains in full: name it in one"):
        ll.plan(vit(), config)
    planned = ll.plan(vit(), ll.LoRAConfig(target_modules=["qkv"], modules_to_save=["auto", "blocks.1"]))
    assert [layer.name for layer in planned.layers] == ["blocks.0.attn.qkv"]


class Beside(nn.Module):
    """A layer of some family, and one that is adapted beside it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = base_model(name), nn.Linear(3, 2)

    def forward(self, *inputs):
        return [self.first(*inputs), self.second(torch.ones(1, 3))]


def beside(name: str) -> Beside:
    torch.manual_seed(0)
    return Beside(name)


@typical_cases
def test_a_layer_of_every_family_in_full(name, tmp_path):
    """Trained, off and on, saved and loaded, ejected, and beside an adapter that has an update of it."""
    model, inputs = beside(name).eval().requires_grad_(False), CASES[name].inputs()  # flags choose kernels
    with torch.no_grad():
        base = run(model, inputs)
    settings = {"rank": 2, "target_modules": ["second"], "modules_to_save": ["first"]}
    ll.inject(model, ll.LoRAConfig(**settings))
    own = [p for p in model.first.parameters() if p.requires_grad]
    assert own and len(own) == len([*model.first.parameters()])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(run(model, inputs)).backward()
    optimizer.step()
    with torch.no_grad():
        trained = run(model, inputs)
        assert not equal(trained, base)
        with ll.adapters_off(model):
            assert equal(run(model, inputs), base)
        ll.save_adapter(model, tmp_path / "own")
        other = beside(name).eval()
        ll.load_adapter(other, tmp_path / "own")
        assert equal(run(other, inputs), trained)
        low_rank = {"target_modules": list(CASES[name].targets), "modules_to_save": None}
        ll.add_adapter(model, "low", ll.LoRAConfig(**{"rank": 2, **CASES[name].options, **low_rank}))
        ll.set_adapter(model, "low")
        for one, wanted in zip(run(model, inputs), base, strict=True):
            torch.testing.assert_close(one, wanted)
        fill_low(model)
        assert not equal(run(model, inputs), base)
        ll.set_adapter(model, "default")
        assert equal(run(model, inputs), trained)
        ll.delete_adapter(model, "low")
        ll.eject(model, merged=True)
        for one, wanted in zip(run(model, inputs), trained, strict=True):
            torch.testing.assert_close(one, wanted)


def fill_low(model: nn.Module) -> None:
    for layer in model.modules():
        if "low" in getattr(layer, "lora", ()):
            for parameter in layer.lora["low"].parameters():
                parameter.normal_(std=0.3)


def fit(folder, path=None):
    module = Classifier()
    torch.manual_seed(0)
    callback = ll.LoRACallback(rank=2, modules_to_save=["auto", "model.3", "model.4"], verbose=False)
    save = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3)
    run = trainer(folder, callback, save)
    run.fit(module, ll.ResumableLoader(loader().dataset, 4, shuffle=True), ckpt_path=path, weights_only=True)
    return module, sorted(folder.glob("*.ckpt"))


def test_a_run_with_layers_in_full_goes_on_as_if_it_had_not_stopped(tmp_path):
    """One of them a norm whose statistics move; its checkpoints hold them and no frozen layer."""
    straight, (first, *_) = fit(tmp_path / "straight")
    wanted = straight.state_dict()
    assert {n.rpartition(".")[0] for n in wanted if ".lora." not in n} == {"model.3", "model.4", "model.9"}
    assert "model.4.running_mean" in wanted
    found = fit(tmp_path / "resumed", first)[0].state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
