"""Which layers are chosen: by structure, by pattern; ranks; and what is said when nothing fits."""

import pytest
import torch
from small import cnn, encoder, mlp, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.utils.pattern_kinds import means, specificity


def names(model, **options):
    return [p.name for p in ll.plan(model, ll.LoRAConfig(**{"rank": 2, **options})).layers]


def timm_model(name, **options):
    import timm

    return timm.create_model(name, num_classes=10, **options)


def test_auto_takes_every_linear_of_a_transformers_blocks():
    plan = ll.plan(vit(), ll.LoRAConfig(rank=2))
    leaves = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert [p.name for p in plan.layers] == [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in leaves]
    assert plan.heads == ["head"]
    assert set(plan.skipped) == {"patch_embed.proj"}


def test_auto_takes_every_convolution_of_a_cnn_but_the_stem():
    plan = ll.plan(cnn(), ll.LoRAConfig(rank=2))
    assert [p.name for p in plan.layers] == ["3", "6"]
    assert plan.heads == ["9"]
    assert plan.skipped == {"0": "the stem"}


@pytest.mark.parametrize(
    ("name", "adapted", "head", "stem"),
    [
        ("resnet18", 19, "fc", {"conv1"}),
        ("resnet50d", 52, "fc", {"conv1.0", "conv1.3", "conv1.6"}),
        ("efficientnet_b0", 80, "classifier", {"conv_stem"}),
        ("convnext_atto", 39, "head.fc", {"stem.0"}),
    ],
)
def test_auto_on_timm_cnns(name, adapted, head, stem):
    plan = ll.plan(timm_model(name), ll.LoRAConfig(rank=2))
    assert len(plan.layers) == adapted
    assert plan.heads == [head]
    assert {n for n, reason in plan.skipped.items() if reason == "the stem"} == stem


@pytest.mark.parametrize(
    ("name", "adapted", "heads"),
    [
        ("resnet18", 19, ["fc"]),
        ("vgg11", 9, ["classifier.6"]),
        ("mobilenet_v3_small", 52, ["classifier.3"]),
        ("vit_b_16", 48, ["heads.head"]),
        ("swin_t", 51, ["head"]),
    ],
)
def test_auto_on_torchvision(name, adapted, heads):
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    plan = ll.plan(model, ll.LoRAConfig(rank=2))
    assert (len(plan.layers), plan.heads) == (adapted, heads)


def test_auto_leaves_the_seven_convolutions_before_wav2vec2s_blocks():
    import torchaudio

    with torch.device("meta"):
        model = torchaudio.models.wav2vec2_base()
    plan = ll.plan(model, ll.LoRAConfig(rank=2))
    assert len(plan.layers) == 12 * 6 and not any("feature_extractor" in p.name for p in plan.layers)


def test_counts_are_those_of_the_injected_model():
    for build in (mlp, cnn, vit, encoder):
        for options in ({}, {"use_dora": True}, {"train_norm": "affine", "train_bias": "all"}):
            model = build()
            config = ll.LoRAConfig(rank=2, **options)
            planned = ll.plan(model, config)
            done = ll.inject(model, config)
            assert planned == done
            assert done.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert done.total == sum(p.numel() for p in model.parameters())


def test_the_biases_that_train():
    found = {}
    for train_bias in ("none", "lora_only", "all"):
        model = mlp()
        ll.inject(model, ll.LoRAConfig(target_modules=["0"], modules_to_save=None, train_bias=train_bias))
        found[train_bias] = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert found == {
        "none": [],
        "lora_only": ["0.bias"],
        "all": [f"{i}.bias" for i in (0, 1, 3, 5)],
    }


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["qkv"], ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        (["attn.qkv"], ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        (["blocks.1.*"], [f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]),
        (["mlp.fc?"], [f"blocks.{i}.mlp.fc{k}" for i in (0, 1) for k in (1, 2)]),
        (r"blocks\.0\..*fc1", ["blocks.0.mlp.fc1"]),
        (["patch_embed.proj", "fc1"], ["patch_embed.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
    ],
)
def test_patterns(patterns, expected):
    assert names(vit(), target_modules=patterns) == expected


def test_all_is_every_supported_layer_but_the_head():
    assert len(names(vit(), target_modules="all")) == 9


def test_excluded_layers_are_left():
    assert names(vit(), target_modules=["attn.*"], exclude_modules=["proj"]) == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
    ]


def test_the_longest_pattern_that_matches_wins():
    plan = ll.plan(
        vit(),
        ll.LoRAConfig(
            rank=2,
            target_modules=["qkv", "fc1"],
            rank_pattern={"qkv": 4, "blocks.1.attn.qkv": 6},
            alpha_pattern={"fc1": 5},
        ),
    )
    assert {p.name: (p.rank, p.alpha) for p in plan.layers} == {
        "blocks.0.attn.qkv": (4, 8),
        "blocks.0.mlp.fc1": (2, 5),
        "blocks.1.attn.qkv": (6, 12),
        "blocks.1.mlp.fc1": (2, 5),
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": ["qvk"]}, "'qvk' matches no layer. Did you mean 'qkv'"),
        ({"target_modules": ["qkv", "atn.proj"]}, "'atn.proj' matches no layer. Did you mean 'attn.proj'"),
        ({"target_modules": "all-linear"}, "is PEFT's: here 'all'"),
        ({"target_modules": ["head"]}, "'head' matches head (in modules_to_save"),
        ({"exclude_modules": ["qvk"]}, "exclude_modules: 'qvk'"),
        ({"exclude_modules": ["*"]}, "leaves no layer to adapt after exclude_modules"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: 'haed' matches no layer. Did you mean 'head'"),
        ({"rank_pattern": {"qvk": 3}}, "rank_pattern: 'qvk'"),
        ({"alpha_pattern": {"qvk": 3}}, "alpha_pattern: 'qvk'"),
        ({"backbone": "blocs"}, "Did you mean 'blocks'"),
        (
            {"rank_pattern": {"qkv": 30}, "target_modules": ["qkv"]},
            "rank_pattern['qkv']=30 is above the smaller side, 24, of blocks.0.attn.qkv and 1 more: give",
        ),
        ({"rank_pattern": {"layer(": 3}}, "rank_pattern: 'layer(' is not a regular expression: missing )"),
        (
            {"target_modules": ["qkv", "fc1)"]},
            "target_modules: 'fc1)' is not a regular expression: unbalanced",
        ),
    ],
)
def test_what_matches_nothing_or_does_not_fit_is_named(options, says):
    model = vit()
    with pytest.raises(ll.ConfigError) as caught:
        ll.inject(model, ll.LoRAConfig(**{"rank": 2, **options}))
    assert says in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_all_problems_of_one_model_come_together():
    with pytest.raises(ll.ConfigError) as caught:
        ll.plan(vit(), ll.LoRAConfig(target_modules=["qvk"], exclude_modules=["x"], modules_to_save=["y"]))
    assert len(caught.value.problems) == 3


def test_a_rank_for_all_is_capped_at_the_smaller_side_of_each_layer():
    model = timm_model("efficientnet_b0")
    plan = ll.plan(model, ll.LoRAConfig(rank=8, alpha=16))
    capped = {p.name: p for p in plan.layers if p.asked}
    assert capped and all("conv_reduce" in n or "conv_expand" in n for n in capped)
    assert {(p.rank, p.asked, p.alpha) for p in capped.values()} == {(4, 8, 16), (6, 8, 16)}
    assert "8, capped at 4" in str(plan)
    assert not any("smaller side" in reason for reason in plan.skipped.values())
    ll.inject(model, ll.LoRAConfig(rank=8, alpha=16))
    update = model.get_submodule(next(iter(capped))).lora["default"]["weight"]
    assert (update.rank, update.scaling) == (4, 4)  # alpha / the layer's own rank, as in PEFT


@pytest.mark.parametrize("pattern", ["*", ".*", r"\d"])
def test_only_a_rank_given_by_name_is_refused_where_it_does_not_fit(pattern):
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8))
    options = {"target_modules": ["0", "1"], "modules_to_save": None}
    plan = ll.plan(model, ll.LoRAConfig(rank=2, rank_pattern={pattern: 5}, **options))
    assert [(p.rank, p.asked) for p in plan.layers] == [(3, 5), (3, 5)]
    with pytest.raises(
        ll.ConfigError, match=r"rank_pattern\['1'\]=5 is above the smaller side, 3, of 1: give"
    ):
        ll.plan(model, ll.LoRAConfig(rank=2, rank_pattern={"*": 2, "1": 5}, **options))


def test_a_model_that_is_one_layer_is_named_in_the_plan_and_in_messages():
    model = nn.Conv2d(6, 9, (3, 5), groups=3)
    options = {"target_modules": "all", "modules_to_save": None}
    plan = ll.plan(model, ll.LoRAConfig(rank=4, **options))
    assert [(p.rank, p.alpha) for p in plan.layers] == [(3, 6)]
    assert str(plan).splitlines()[2].startswith("the model itself") and "4, capped at 3" in str(plan)
    with pytest.raises(ll.ConfigError, match=r"the model itself .Bilinear is not linear in one input"):
        ll.plan(nn.Bilinear(2, 2, 2), ll.LoRAConfig(**options))
    x = torch.randn(2, 6, 7, 7)
    before = model(x)
    ll.inject(model, ll.LoRAConfig(rank=4, **options))
    assert (model(x) - before).abs().max() < 1e-6


NAMES = ["layer.1", "layer.11", "layer_1", "layer11", "outer.layer.1", "layer.10.layer", "layer.1.fc"]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("layer.1", {"layer.1", "outer.layer.1"}),
        ("layer1", set()),
        ("r.1", set()),
        ("1", {"layer.1", "outer.layer.1"}),
        ("layer.?", {"layer.1", "outer.layer.1"}),
        ("layer.1*", {"layer.1", "layer.11", "outer.layer.1", "layer.10.layer", "layer.1.fc"}),
        ("layer[_.]1", {"layer.1", "layer_1", "outer.layer.1"}),
        (r"layer\.1", {"layer.1", "outer.layer.1"}),
        (r"^layer\.1", {"layer.1"}),
        (r"^layer\.1$", {"layer.1"}),
        (r"layer.1+", {"layer.1", "layer.11", "layer_1", "layer11", "outer.layer.1"}),
        (r"layer\.\d+", {"layer.1", "layer.11", "outer.layer.1"}),
        (".*fc", {"layer.1.fc"}),
        ("(layer_1|fc)", {"layer_1", "layer.1.fc"}),
    ],
)
def test_a_name_is_a_name_a_glob_a_glob_and_a_regular_expression_only_what_is_one(pattern, meant):
    assert {n for n in NAMES if means(pattern, n)} == meant


def test_names_with_dots_mean_no_other_layers():
    layers = {"layer": nn.ModuleList(nn.Linear(4, 4) for _ in range(12))}
    model = nn.ModuleDict({**layers, "layer11": nn.Linear(4, 4), "layer_1": nn.Linear(4, 4)})
    for options in ({"rank_pattern": {"layer.1": 2}}, {"alpha_pattern": {"layer.1": 2}}):
        plan = ll.plan(model, ll.LoRAConfig(rank=3, target_modules="all", modules_to_save=None, **options))
        other = {p.name for p in plan.layers if (p.rank, p.alpha) != (3, 6)}
        assert other == {"layer.1"}
    assert names(model, target_modules=["layer.1"], modules_to_save=None) == ["layer.1"]
    left = set(names(model, target_modules="all", exclude_modules=["layer.1"], modules_to_save=None))
    assert len(left) == 13 and "layer.1" not in left


def test_the_most_specific_key_wins():
    keys = ["*", "l.*", r"^layer\.\d$", "1", "layer.1", r"^layer\.1$"]
    assert sorted({*keys}, key=specificity) == keys


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Bilinear(2, 2, 2), "Bilinear is not linear in one input"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.Linear(4, 4, dtype=torch.complex64), "its weight is complex64"),
    ],
)
def test_layers_that_cannot_be_adapted_say_why(layer, says):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(ll.ConfigError, match=f"{says}.*cannot be adapted"):
        ll.plan(model, ll.LoRAConfig(rank=2, target_modules=["0"]))
    with pytest.raises(ll.ConfigError, match=f"leaves no layer to adapt.*{says}"):
        ll.plan(nn.Sequential(layer, nn.ReLU()), ll.LoRAConfig(rank=2))


def test_only_the_backbone_is_planned():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = vit()
            self.neck = nn.Linear(3, 3)

    plan = ll.plan(Detector(), ll.LoRAConfig(rank=2))
    assert plan.backbone == "backbone"
    assert all(p.name.startswith("backbone.blocks") for p in plan.layers)
    model = Detector()
    ll.inject(model, ll.LoRAConfig(rank=2))
    assert all(p.requires_grad for p in model.neck.parameters())
    assert not model.backbone.patch_embed.proj.weight.requires_grad


def test_the_plan_prints_as_a_table():
    text = str(ll.plan(vit(), ll.LoRAConfig(rank=2)))
    assert text.splitlines()[2].split() == ["blocks.*.attn.qkv", "2", "72×24", "2", "384"]
    assert "trained in full: head" in text
    assert "left frozen: patch_embed.proj" in text
    assert text.splitlines()[-1].startswith("trainable: ")


def test_near_misses_are_endings_that_would_match():
    layers = {"convs": nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))}
    layers["attn"] = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    model = nn.ModuleDict({"stages": nn.ModuleDict(layers)})
    for pattern, remedy in (
        (["qvk"], "Did you mean 'qkv' or "),
        (["fc"], r"Layers here: convs\.\*\.0, qkv, qkv\.k, qkv\.q, qkv\.v\."),
        ("qkv", r"A string is a regular expression for whole names: for an ending give a list, \['qkv'\]"),
        ("all-linear", "is PEFT's: here 'all'"),
    ):
        with pytest.raises(ll.ConfigError, match=remedy):
            ll.plan(model, ll.LoRAConfig(rank=2, target_modules=pattern, modules_to_save=None))
    assert len(ll.plan(model, ll.LoRAConfig(rank=2, target_modules=["convs.*.0"])).layers) == 2


def test_a_plan_says_that_what_is_outside_the_backbone_stays_as_it_was():
    model = nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "neck": nn.Linear(4, 4)}
    )
    text = str(ll.plan(model, ll.LoRAConfig(rank=2, modules_to_save=None)))
    assert "outside backbone: as it was, what trained before still trains" in text
