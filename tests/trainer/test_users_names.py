"""Modules of the user's own that are called as parts of an update are: nothing is told by a name."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Classifier, loader, mlp, moved, pretrained, trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_lightning as ll
from lora_lightning.app.rebuild import merge_files
from lora_lightning.utils.names import named_parameters


class Net(nn.Module):
    """Frozen `body.lora_mid` and `body.lora.default`, adapted `body.lora_A`, a head `lora_head`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"lora_mid": nn.Linear(6, 6), "lora_A": nn.Linear(6, 6)})
        self.body["lora"] = nn.ModuleDict({"default": nn.Linear(6, 6), "lora_B": nn.LayerNorm(6)})
        self.lora_head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["lora_A"](self.body["lora_mid"](x).tanh()).tanh()
        inner = self.body["lora"]
        return self.lora_head(inner["lora_B"](inner["default"](x)))


OPTIONS = {"rank": 2, "target_modules": ["body.lora_A"], "modules_to_save": ["lora_head"]}


class Owner(Classifier):
    def __init__(self, attribute: str = "model") -> None:
        super().__init__(nn.Identity())
        del self.model
        self.attribute = attribute
        setattr(self, attribute, pretrained(Net))
        self.save_hyperparameters()

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.attribute)(x)


def outputs(module: nn.Module) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return module.eval()(x)


@pytest.mark.parametrize("attribute", ["model", "lora", "lora_A"])
@pytest.mark.parametrize("full", ["adapter", "full"])
def test_fit_save_load_resume_and_merge(attribute, full, tmp_path):
    def callback():
        return ll.LoRACallback(**OPTIONS, checkpoint=full)

    module, straight = Owner(attribute), Owner(attribute)
    torch.manual_seed(0)
    run = trainer(tmp_path, callback())
    run.fit(module, loader(mlp))
    run.save_checkpoint(tmp_path / "x.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    for name in ("x", "weights"):
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        held = {n for n, t in state.items() if t.numel()}
        assert held == (trained if full == "adapter" else set(named_parameters(module)))
        loaded = ll.load_from_checkpoint(Owner, tmp_path / f"{name}.ckpt")
        assert torch.equal(outputs(loaded), outputs(module))
    torch.manual_seed(0)
    trainer(tmp_path, callback(), max_epochs=3).fit(straight, loader(mlp))
    resumed = Owner(attribute)
    trainer(tmp_path, callback(), max_epochs=3).fit(resumed, loader(mlp), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(outputs(resumed), outputs(straight))
    base = None if full == "full" else tmp_path / "base.safetensors"
    if base:
        save_file(pretrained(Net).state_dict(), base)
    merge_files(tmp_path / "x.ckpt", tmp_path / "merged.safetensors", base)
    network = Net()
    network.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(outputs(network), outputs(module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["lora_lightning", "peft"])
@pytest.mark.parametrize("options", [{}, {"train_bias": "all"}, {"use_dora": True}])
def test_adapters_in_both_formats(format, options, tmp_path):
    model = pretrained(Net)
    ll.inject(model, ll.LoRAConfig(**OPTIONS, **options))
    moved(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    ll.save_adapter(model, tmp_path, format=format)
    again = pretrained(Net)
    ll.load_adapter(again, tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-6)
    ll.eject(again)
    assert torch.equal(outputs(again), outputs(pretrained(Net)))
    if format == "peft":
        theirs = peft.PeftModel.from_pretrained(pretrained(Net), tmp_path)
        torch.testing.assert_close(outputs(theirs), outputs(model), rtol=0, atol=1e-6)


def test_a_head_called_as_a_factor_is_a_head_in_pefts_files_too(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["body.lora_mid"], modules_to_save=["body.lora_A"])
    theirs = peft.get_peft_model(pretrained(Net), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    model = pretrained(Net)
    ll.load_adapter(model, tmp_path)
    assert model.lora_state.plan.heads == ["body.lora_A"]
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=0, atol=1e-6)


def test_weight_decay_is_for_what_trains_in_full():
    model = pretrained(Net)
    ll.inject(model, ll.LoRAConfig(**{**OPTIONS, "modules_to_save": ["lora_head", "lora_mid"]}))
    groups = {g["name"]: g["params"] for g in ll.param_groups(model, head=set(), weight_decay=0.1)}
    assert {id(p) for p in groups["backbone"]} == {
        id(model.lora_head.weight),
        id(model.body["lora_mid"].weight),
    }


class WithLora(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.lora = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora(x)


class WithMethod(nn.Linear):
    """Keeps nn.Linear's forward and names what LoRALinear names."""

    def branch(self) -> int:
        return 3


class WithAttributes(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.read, self.updates = False, None


class LoRAOfAnother(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 6)), nn.Parameter(torch.zeros(6, 2))


class Parametrization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 6)), nn.Parameter(torch.zeros(6, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


def parametrized() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Parametrization())
    return layer


REFUSED = {
    WithLora: "its attribute lora is one that an adapted layer needs for itself: rename it",
    lambda: WithMethod(6, 6): "its attribute branch is one that",
    WithAttributes: "its attribute read and updates is one that",
    LoRAOfAnother: "it has a lora_A and a lora_B already: merge its updates first",
    parametrized: "it has a lora_A and a lora_B already: merge its updates first",
}


@pytest.mark.parametrize(("build", "says"), REFUSED.items(), ids=[s.split(":")[0] for s in REFUSED.values()])
def test_layers_with_something_of_that_name_are_refused_before_anything_changes(build, says):
    model = nn.Sequential(build(), nn.Linear(6, 6))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ll.ConfigError, match=rf"'0' matches 0 \({says}"):
        ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0", "1"], modules_to_save=None))
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == classes
    plan = ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    assert plan.skipped["0"].startswith(says)
    ll.add_adapter(model, "second", ll.LoRAConfig(rank=1, target_modules=["1"], modules_to_save=None))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_that_peft_has_adapted_is_refused(wrapped):
    config = peft.LoraConfig(r=2, target_modules=["0"])
    make = peft.get_peft_model if wrapped else lambda m, c: peft.inject_adapter_in_model(c, m)
    model = make(pretrained(mlp), config)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ll.ConfigError, match=r"PEFT has adapted the model \(.*merge_and_unload\(\) first"):
        ll.inject(model, ll.LoRAConfig(rank=2))
    assert [p.requires_grad for p in model.parameters()] == flags
    ll.inject(peft.get_peft_model(pretrained(mlp), config).merge_and_unload(), ll.LoRAConfig(rank=2))
