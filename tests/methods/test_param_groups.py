"""param_groups: which parameter of a module gets which rate and decay, for any optimizer of one's own."""

import lightning.pytorch as pl
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from small import Classifier, Net, loader, trainer, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.methods.layer_rates import layers_of
from lora_lightning.methods.optimizers import head_parameters
from lora_lightning.methods.pairs import pairs_of


class Every(nn.Module):
    """A layer of each kind of slot."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=2)
        self.transposed = nn.ConvTranspose1d(8, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.lstm = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 3)


def every(**options):
    model = Every()
    names = ["embedding", "linear", "conv", "transposed", "lstm.weight_ih_l0"]
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=names, modules_to_save=["head"], **options))
    return model


def names(model, group):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def groups_of(model, **options):
    return {group["name"]: group for group in ll.param_groups(model, **options)}


def rates(model, groups):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)]: g["lr"] for g in groups for p in g["params"]}


def test_full_fine_tuning_decays_matrices_alone_and_gives_the_head_its_rate():
    model = Net()
    groups = groups_of(model, lr=1e-3, head_lr=1e-2, weight_decay=0.05)
    assert {name: names(model, group) for name, group in groups.items()} == {
        "backbone": ["stem.weight", "conv.weight"],
        "backbone_no_decay": ["stem.bias", "conv.bias", "norm.weight", "norm.bias"],
        "head": ["fc.weight"],
        "head_no_decay": ["fc.bias"],
    }
    assert [group["lr"] for group in groups.values()] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert [group["weight_decay"] for group in groups.values()] == [0.05, 0, 0.05, 0]


def test_lora_trains_undecayed_updates_and_the_head():
    model = Net()
    ll.inject(model, ll.LoRAConfig(rank=2))
    groups = groups_of(model, weight_decay=0.05)
    assert list(groups) == ["backbone_no_decay", "head", "head_no_decay"]
    assert all("lora_" in name for name in names(model, groups["backbone_no_decay"]))
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())
    assert {group["lr"] for group in groups.values()} == {1e-3}  # head_lr=None is lr


def test_the_order_is_that_of_the_parameters():
    first, second = (ll.param_groups(every(), lora_plus=4) for _ in range(2))
    assert [g["name"] for g in first] == [g["name"] for g in second]
    for a, b in zip(first, second, strict=True):
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]


def test_two_heads_none_and_ones_own():
    model = Net()
    model.aux = nn.Linear(8, 4)
    model.get_classifier = lambda: (model.fc, model.aux)
    assert head_parameters(model) == {*model.fc.parameters(), *model.aux.parameters()}
    assert head_parameters(nn.Linear(2, 2)) == set()
    groups = groups_of(model, head=model.aux.parameters(), head_lr=0.1)
    assert names(model, groups["head"]) == ["aux.weight"]


def test_bad_options_are_refused_in_one_message():
    with pytest.raises(ConfigError, match=r"head_lr=0.01: no head trains in Linear") as caught:
        ll.param_groups(nn.Linear(2, 2), head_lr=0.01, lora_plus=4)
    assert "lora_plus=4: no update with a lora_B trains in Linear" in caught.value.problems[1]
    with pytest.raises(ConfigError, match="no parameter of Net requires a gradient"):
        ll.param_groups(Net().requires_grad_(False))
    with pytest.raises(ConfigError, match="no blocks are found in Linear"):
        ll.param_groups(nn.Linear(2, 2), layer_decay=0.5)
    with pytest.raises(ConfigError) as caught:
        ll.param_groups(Net(), lr=0, lora_plus=0.5, weight_decays=0.1)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "lr=0: give a number above 0" in problems
    assert "lora_plus=0.5: give a number of at least 1" in problems
    assert "weight_decays=0.1 is not an option of param_groups. Did you mean 'weight_decay'" in problems


def test_lora_plus_is_for_the_outputs_factor_of_what_sums_over_inputs():
    """In transposed convolutions too; not for embeddings, magnitudes, norms and the head."""
    model = every(use_dora=False, train_norm="affine")
    found = rates(model, ll.param_groups(model, lr=1e-3, lora_plus=16))
    faster = {name for name, lr in found.items() if lr == 16e-3}
    assert faster == {name for name in found if name.endswith("lora_B") and not name.startswith("embedding")}
    assert len(faster) == 4
    assert {lr for name, lr in found.items() if name not in faster} == {1e-3}
    linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ll.inject(linear, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None, use_dora=True))
    found = rates(linear, ll.param_groups(linear, lr=1e-3, lora_plus=2))
    assert {lr for name, lr in found.items() if "magnitude" in name} == {1e-3}


def test_lora_plus_goes_with_layer_decay_and_the_heads_rate():
    model = vit()
    ll.inject(model, ll.LoRAConfig(rank=2))
    groups = ll.param_groups(model, lr=1e-2, head_lr=0.5, layer_decay=0.5, lora_plus=4)
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("backbone.01_B_no_decay", 1e-2),
        ("backbone.01_no_decay", 2.5e-3),
        ("backbone.02_B_no_decay", 2e-2),
        ("backbone.02_no_decay", 5e-3),
        ("head", 0.5),
        ("head_no_decay", 0.5),
    ]
    plain = rates(model, ll.param_groups(model, lr=1e-2, layer_decay=0.5))
    assert plain["blocks.1.mlp.fc1.lora.default.weight.lora_A"] == 5e-3
    assert plain["blocks.0.attn.qkv.lora.default.weight.lora_B"] == 2.5e-3


def test_an_adapted_head_is_a_head():
    model = Net()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["conv", "fc"], modules_to_save=None))
    groups = groups_of(model, lr=1e-3, head_lr=1e-2, lora_plus=2)
    assert {name: group["lr"] for name, group in groups.items()} == {
        "backbone_B_no_decay": 2e-3,
        "backbone_no_decay": 1e-3,
        "head_B_no_decay": 2e-2,
        "head_no_decay": 1e-2,
    }


def test_pefts_updates_are_updates():
    """Not decayed, and of LoRA+ the rates that PEFT's own function gives, which counts embeddings apart."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Conv2d(8, 8, 3, groups=2), nn.Embedding(5, 6), nn.Linear(6, 3))
    config = peft.LoraConfig(r=4, target_modules=["0", "1", "2"], modules_to_save=["3"])
    theirs = peft.get_peft_model(model, config)
    groups = groups_of(theirs, lr=1e-3, weight_decay=0.1, lora_plus=16, head=())
    assert names(theirs, groups["backbone"]) == ["base_model.model.3.modules_to_save.default.weight"]
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-3
    )
    wanted = rates(theirs, optimizer.param_groups)
    wanted = {name: lr for name, lr in wanted.items() if not name.endswith("bias")}  # theirs are as fast as B
    found = rates(theirs, groups.values())
    assert {name: lr for name, lr in found.items() if name in wanted} == wanted
    conv = next(pair for pair in pairs_of(theirs) if pair.groups == 2)
    assert [conv.rows(p, p).shape for p in (conv.A, conv.B)] == [(2, 2, 72), (2, 2, 4)]


@pytest.mark.parametrize("name", ["vit", "test_resnet", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_layer_decay_is_timms(name):
    import timm
    from timm.optim import param_groups_layer_decay

    small = {"embed_dim": 24, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 2, 1)} if "swin" in name else {}
    model = vit() if name == "vit" else timm.create_model(name, num_classes=3, **small)
    found = rates(model, ll.param_groups(model, lr=1e-2, layer_decay=0.75))
    theirs = param_groups_layer_decay(model, layer_decay=0.75)
    wanted = rates(model, [{**g, "lr": 1e-2 * g["lr_scale"]} for g in theirs])
    assert found == pytest.approx(wanted)
    assert len(set(found.values())) > 3


def test_layer_decay_by_blocks_where_no_model_says():
    from torchvision.models import resnet18

    model = nn.Sequential(resnet18())
    layers, last = layers_of(model)
    by_name = {n: layers[id(p)] for n, p in model.named_parameters()}
    assert last == 9
    assert (by_name["0.conv1.weight"], by_name["0.bn1.bias"]) == (0, 0)
    assert (by_name["0.layer1.0.conv1.weight"], by_name["0.layer4.1.bn2.weight"]) == (1, 8)
    assert by_name["0.layer2.0.downsample.0.weight"] == 3
    assert by_name["0.fc.weight"] == 9


class Grouped(Classifier):
    """A user's module with an optimizer of its own."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled

    def configure_optimizers(self):
        if self.scaled:
            return ll.ScaledAdamW(ll.param_groups(self, lr=1e-2), self)
        return torch.optim.SGD(ll.param_groups(self, lr=1e-2, head_lr=1e-3, lora_plus=4), momentum=0.9)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_run_of_ones_own_module_goes_on_exactly(scaled, tmp_path):
    def fit(folder, path=None):
        module = Grouped(scaled)
        save = pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3)
        run = trainer(folder, ll.LoRACallback(rank=2, verbose=False), save)
        run.fit(module, ll.ResumableLoader(loader().dataset, 4), ckpt_path=path, weights_only=True)
        return module.state_dict()

    wanted = fit(tmp_path / "straight")
    found = fit(tmp_path / "resumed", tmp_path / "straight" / "step=3.ckpt")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert any(name.endswith("lora_B") and wanted[name].any() for name in wanted)
