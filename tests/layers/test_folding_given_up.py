"""Frozen norms are folded where nothing can see it, and left alone, or refused, elsewhere."""

import copy
import pickle

import pytest
import torch
from folding_networks import Block, adapted, agree, network, randomized
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.inject import freeze_norms
from lora_lightning.layers.norm import FrozenNorm


class TestNobodyLooks:
    """Where something else may see what is between the two, and where nothing trains, nothing is folded."""

    @pytest.mark.parametrize("where", ["conv1", "bn1"])
    @pytest.mark.parametrize(
        "register",
        ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
    )
    def test_hooks(self, where, register, folded):
        plain, model = (adapted(network(), fold) for fold in (False, True))
        model[0].act = nn.ReLU()  # what a hook gave cannot be changed in place
        handle = getattr(model[0].get_submodule(where), register)(lambda *given: None)
        agree(model, plain)
        assert len(folded) == 5
        handle.remove()
        agree(model, plain)
        assert len(folded) == 11

    def test_a_hook_on_all_modules(self, folded):
        model = adapted(network(), True)
        seen = []
        with nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(y.clone())):
            model(torch.randn(2, 4, 6, 6, dtype=torch.float64))
        assert seen and not folded

    def test_without_training(self, folded):
        model, x = adapted(network(), True), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            model(x)
        model.eval()(x)
        with ll.adapters_off(model.train()):
            off = model(x)
        assert torch.equal(off, network().eval()(x)) and not folded
        ll.merge(model)
        model(x)
        assert not folded
        ll.unmerge(model)
        model(x)
        assert len(folded) == 6

    def test_another_adapter(self, folded):
        model, x = adapted(network(), True), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        ll.add_adapter(
            model, "other", config={"rank": 2, "target_modules": ["conv1"], "modules_to_save": None}
        )
        ll.set_adapter(model, "other")
        model(x)
        assert not folded
        ll.set_adapter(model, "default")
        model(x)
        assert len(folded) == 6

    def test_a_sum_with_an_adapter_that_trains_norms(self):
        model = adapted(network(), True)
        norms = {"rank": 2, "target_modules": ["conv1"], "modules_to_save": None, "train_norm": "both"}
        ll.add_adapter(model, "other", config=norms)
        ll.combine(model, ["default", "other"], [1.0, 1.0], into="sum")
        ll.set_adapter(model, "sum")
        assert all(layer.lora_norm is None for layer in ll.layers.registry.lora_layers(model).values())

    def test_a_norm_that_trains(self, folded):
        model = adapted(network(), True)
        model[0].bn1.weight.requires_grad_(True)
        model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).sum().backward()
        assert len(folded) == 5 and model[0].bn1.weight.grad.any()


class Other(nn.Module):
    """Forwards with a second reader, and some in which the norm is not behind a convolution alone."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.bn, self.way = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), way

    def forward(self, x):
        y = self.conv(x)
        if self.way == "residual":
            return self.bn(y) + y
        if self.way == "twice":
            return self.bn(y) + self.bn(self.conv(x))
        if self.way == "norm twice":
            return self.bn(self.bn(y))
        if self.way == "returned":
            return self.bn(y) + torch.stack([y, y]).sum()
        if self.way == "kept":
            self.kept = y
            return self.bn(y)
        if self.way == "between":
            return self.bn(y * 2)
        if self.way == "pre-activation":
            return self.conv(self.bn(x))
        if self.way == "in place":
            return self.bn(y.mul_(2))
        return self.bn(y) if y.mean() > 0 else self.bn(-y)


@pytest.mark.parametrize(
    "way",
    ["residual", "twice", "norm twice", "returned", "kept", "between", "pre-activation", "in place", "data"],
)
def test_other_readers(way, folded):
    model = randomized(nn.Sequential(Other(way), nn.Flatten()))
    one, other = (adapted(model, fold, target_modules=["conv"]) for fold in (True, False))
    assert "kept" not in one[0].__dict__
    agree(one, other)
    assert not folded


def test_shared_modules_are_left_alone(folded):
    block = Block(4, 4)
    model = randomized(nn.Sequential(block, nn.Sequential(block.conv1, nn.BatchNorm2d(4))))
    one, other = (adapted(model, fold) for fold in (True, False))
    agree(one, other)
    assert len(folded) == 2  # conv2 and around


def test_modules_in_a_list(folded):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
            self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(4) for i in range(2)})

        def forward(self, x):
            for i, conv in enumerate(self.convs):
                x = self.norms[str(i)](conv(x)).relu()
            return x

    model = randomized(Listed())
    agree(*(adapted(model, fold, target_modules=["0", "1"]) for fold in (True, False)))
    assert len(folded) == 2


def test_what_does_not_reach_the_norm_is_refused():
    model = adapted(network(), True)
    y = model[0].conv1(torch.randn(2, 4, 6, 6, dtype=torch.float64))
    with pytest.raises(ll.UserError, match=r"0\.conv1 computed did not reach 0\.bn1"):
        y.sum().backward()


def test_new_statistics_are_seen(folded):
    model, other = (adapted(network(), fold) for fold in (True, False))
    agree(model, other)
    for one in (model, other):
        one[0].bn1.running_var.mul_(2)
        one[1].bn2.weight.data = one[1].bn2.weight.data * 3
    agree(model, other)
    assert len(folded) == 12


def test_names_copies_and_the_way_back(folded):
    base = network()
    model, other = (adapted(base, fold) for fold in (True, False))
    assert list(model.state_dict()) == list(other.state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[0].conv1.lora_norm.norm is again[0].bn1
        agree(again, other)
    assert len(folded) == 12
    ll.eject(model)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), base.modules(), strict=True))
    assert not any(name.startswith("lora") for m in model.modules() for name in m.__dict__)


def test_norms_that_another_tool_replaces(folded):
    model = adapted(network(), True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze_norms(model)
    agree(model, adapted(network(), False))
    assert len(folded) == 6


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_networks_of_libraries(library, folded):
    if library == "timm":
        import timm

        model = timm.create_model("test_efficientnet", num_classes=3)
        count = sum("BatchNormAct2d" in type(m).__name__ for m in model.modules())
    else:
        from torchvision.models import resnet18
        from torchvision.ops.misc import FrozenBatchNorm2d

        model = resnet18(num_classes=3, norm_layer=FrozenBatchNorm2d)
        count = 20
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2), module.running_mean.normal_(std=0.1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    one, other = (adapted(model.double(), fold, target_modules="all") for fold in (True, False))
    agree(one, other, x, {"rtol": 1e-7, "atol": 1e-9})
    assert len(folded) == count
    ll.eject(one)
    assert not any(isinstance(m, FrozenNorm) for m in one.modules())
    assert [m.training for m in one.modules()] == [m.training for m in model.modules()]


def test_the_line_in_the_log(monkeypatch):
    lines = []
    monkeypatch.setattr("lora_lightning.adapters.fold.rank_zero_info", lines.append)
    adapted(nn.Sequential(network(), randomized(Other("data"))), True)
    assert len(lines) == 1 and lines[0].startswith("fold_norms: 6 of 7 frozen norms are folded")
    assert "1.bn" in lines[0] and "The forward of 1 cannot be traced (TraceError" in lines[0]
    adapted(network(), True)
    assert lines[1] == "fold_norms: 6 of 6 frozen norms are folded into the convolutions before."


@pytest.mark.parametrize("options", [{"train_norm": "both"}, {"implementation": "reference"}])
def test_what_does_not_go_together_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ll.ConfigError, match=f"folds no norm with {name}='{value}': set {name} to"):
        ll.LoRAConfig(fold_norms=True, **options)
    assert ll.LoRAConfig.problems({"fold_norms": True, **options}, "lora.")[0].startswith("lora.fold_norms=")
