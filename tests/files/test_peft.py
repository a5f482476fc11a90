"""Adapters to PEFT and back, against the real `peft`: the same outputs on the same base."""

import json
import warnings

import peft
import pytest
import torch
from peft_models import (
    BATCHES,
    Convolutions,
    bert,
    built,
    gpt2,
    hf_vit,
    logits,
    shaken,
    timm_resnet,
    timm_vit,
    torchvision_resnet,
    torchvision_vit,
    wav2vec2,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lightning as ll
from lora_lightning.app.inspect import inspect
from lora_lightning.files.locate import read_source
from lora_lightning.files.merge import merge_state

pytestmark = pytest.mark.filterwarnings("ignore")

OURS = [
    (timm_vit, {}),
    (timm_vit, {"use_rslora": True, "rank_pattern": {"qkv": 6}, "alpha_pattern": {"blocks.1.mlp.fc1": 3.5}}),
    (timm_vit, {"use_dora": True, "train_norm": "affine"}),
    (timm_vit, {"train_bias": "all"}),
    (timm_vit, {"train_bias": "lora_only", "target_modules": ["qkv", "fc2"]}),
    (timm_vit, {"modules_to_save": ["auto", "blocks.1", "norm"]}),
    (timm_resnet, {"train_norm": "both"}),
    (timm_resnet, {"modules_to_save": ["auto", "layer1.0"]}),
    (timm_resnet, {"use_dora": True}),
    (torchvision_resnet, {"train_norm": "both", "rank_pattern": {"layer1.*": 3}}),
    (torchvision_vit, {"target_modules": ["in_proj", "self_attention.out_proj", "mlp.0", "mlp.3"]}),
    (torchvision_vit, {"target_modules": ["in_proj"], "train_bias": "all", "use_rslora": True}),
    (
        torchvision_vit,
        {"target_modules": ["out_proj", "in_proj"], "rank_pattern": {"out_proj": 5}},
    ),
    (wav2vec2, {}),
    (hf_vit, {"init": "gaussian"}),
    (timm_vit, {"init": "pissa", "use_dora": True, "alpha_pattern": {"blocks.1.mlp.fc1": 3.5}}),
    (torchvision_vit, {"target_modules": ["in_proj", "out_proj"], "init": "pissa", "use_rslora": True}),
    (bert, {"target_modules": ["query", "word_embeddings"], "init": "pissa"}),
    (Convolutions, {"target_modules": "all", "init": "pissa", "rank_pattern": {"one": 3}}),
    (bert, {"target_modules": ["query", "value", "word_embeddings"], "train_bias": "all"}),
    (gpt2, {"target_modules": ["c_attn", "c_fc", "wte"], "modules_to_save": ["score"]}),
    (Convolutions, {"target_modules": "all", "train_norm": "stats"}),
    (Convolutions, {"target_modules": "all", "use_dora": True}),
]


@pytest.mark.parametrize(("build", "options"), OURS)
def test_what_is_saved_here_gives_the_same_outputs_in_peft(build, options, tmp_path):
    model = built(build)
    ll.inject(model, ll.LoRAConfig(rank=4, **options))
    x = BATCHES[build]()
    model.train()
    model(x)  # moves running statistics where they are not frozen
    expected = logits(shaken(model), x)
    ll.save_adapter(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(built(build), tmp_path)
    assert (logits(theirs, x) - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
    assert (logits(built(build), x) - expected).abs().max() > 1e-3  # there was something to carry over
    again = built(build)
    ll.load_adapter(again, tmp_path)
    assert (logits(again, x) - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


THEIRS = [
    (timm_vit, {"target_modules": ["qkv", "fc1"], "init_lora_weights": "pissa", "rank_pattern": {"fc1": 3}}),
    (timm_vit, {"target_modules": ["qkv", "fc2"], "init_lora_weights": "olora", "use_rslora": True}),
    (timm_vit, {"target_modules": ["qkv"], "init_lora_weights": "pissa", "use_dora": True}),
    (gpt2, {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "fan_in_fan_out": True}),
    (timm_vit, {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}),
    (timm_vit, {"target_modules": r"blocks\.\d\.attn\.(qkv|proj)", "use_dora": True, "use_rslora": True}),
    (timm_vit, {"target_modules": ["qkv", "proj"], "exclude_modules": ["patch_embed.proj"], "bias": "all"}),
    (timm_vit, {"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
    (
        timm_vit,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"qkv": 6, "blocks.0.mlp.fc.": 3},
            "alpha_pattern": {"^blocks.1.attn.qkv": 1},
            "bias": "lora_only",
        },
    ),
    (timm_resnet, {"target_modules": r"layer\d.*conv\d", "modules_to_save": ["fc"], "use_dora": True}),
    (
        torchvision_resnet,
        {"target_modules": ["conv1", "conv2"], "modules_to_save": ["bn1", "bn2", "downsample.1", "fc"]},
    ),
    (torchvision_vit, {"target_modules": ["self_attention", "mlp.0"], "modules_to_save": ["heads.head"]}),
    (torchvision_vit, {"target_modules": ["self_attention"], "bias": "all", "r": 5}),
    (wav2vec2, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "bias": "lora_only"}),
    (hf_vit, {"target_modules": ["q_proj", "v_proj", "query"], "modules_to_save": ["classifier"]}),
    (bert, {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["classifier"]}),
    (gpt2, {"target_modules": ["c_attn", "wte"], "modules_to_save": ["score"], "fan_in_fan_out": True}),
    (Convolutions, {"target_modules": ["one", "two", "three", "point"], "modules_to_save": ["norm", "head"]}),
]


@pytest.mark.parametrize(("build", "options"), THEIRS)
def test_what_peft_saved_gives_the_same_outputs_here(build, options, tmp_path):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, **options})
    theirs = shaken(peft.get_peft_model(built(build), config))
    x = BATCHES[build]()
    if build is torchvision_resnet:  # all its running statistics are saved
        theirs.train()(x)
    expected = logits(theirs, x)
    theirs.save_pretrained(tmp_path)
    model = built(build)
    frozen = {n for n, p in model.named_parameters()}
    ll.load_adapter(model, tmp_path)
    assert (logits(model, x) - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_" in n for n in trained) and trained & frozen < frozen
    ll.save_adapter(model, tmp_path / "ours")
    again = built(build)
    ll.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again, x), logits(model, x))


def test_pefts_pissa_is_merged_and_inspected_without_a_model(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights="pissa")
    shaken(peft.get_peft_model(built(timm_vit), config)).save_pretrained(tmp_path)
    model = built(timm_vit)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    merged = merge_state(read_source(tmp_path).saved, model.state_dict()).state
    ll.load_adapter(model, tmp_path)
    ll.eject(model, merged=True)
    torch.testing.assert_close(merged, dict(model.state_dict()), rtol=1e-5, atol=1e-6)
    assert "takes off the base's weights" in inspect(tmp_path)
    assert "takes off" not in inspect(tmp_path, tmp_path / "base.safetensors")


class Uncrossable(nn.Module):
    """One layer for each thing that PEFT cannot express."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.dilated = nn.Conv1d(4, 4, 3, padding=2, dilation=2)
        self.reflected = nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")
        self.back = nn.ConvTranspose1d(4, 4, 1)
        self.qkv = nn.Linear(4, 12)
        self.rnn = nn.GRU(12, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 1, kdim=6, vdim=6, batch_first=True)
        self.bag = nn.EmbeddingBag(5, 4)
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.back(self.reflected(self.dilated(self.grouped(x)))).mT
        x, _ = self.rnn(self.qkv(x))
        keys = torch.cat([x, x[..., :2]], -1)
        return self.head(self.again(self.twice(self.attention(x, keys, keys)[0].mean(1))))


def test_all_that_peft_cannot_have_is_refused_at_once_and_nothing_is_written(tmp_path):
    model = Uncrossable()
    targets = ["grouped", "dilated", "reflected", "back", "qkv.v", "rnn", "attention", "bag", "twice"]
    ll.inject(model, ll.LoRAConfig(rank=1, target_modules=targets))
    with pytest.raises(ll.ConfigError) as caught:
        ll.save_adapter(model, tmp_path / "peft", format="peft")
    problems = "\n".join(caught.value.problems)
    for told in (
        "grouped is a convolution in 2 groups",
        "dilated is dilation 2",
        "reflected is padding_mode 'reflect'",
        "back is a ConvTranspose1d",
        "qkv.v is an update of some rows of qkv: target qkv",
        "rnn.weight_ih_l0 is a GRU",
        "attention.q_proj is a part of a projection",
        "bag is a EmbeddingBag",
        "twice is used under the names twice, again",
    ):
        assert told in problems
    assert problems.count('format="lora_lightning"') >= 9
    assert not (tmp_path / "peft").exists()


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ll.ConfigError, match=r"format='pefft'.*Did you mean 'peft'"):
        ll.save_adapter(ll_injected(timm_vit), tmp_path, format="pefft")


def ll_injected(build, **options):
    model = built(build)
    ll.inject(model, ll.LoRAConfig(rank=2, **options))
    return model


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type='IA3': only LORA"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base's weights"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights='loftq'"),
    ({"lora_bias": True}, "lora_bias=True: its updates have a bias"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["x.weight"]}, "target_parameters"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"use_qalora": True}, "use_qalora=True: this variant of LoRA"),
    ({"new_in_the_future": 3}, "new_in_the_future=3"),
    ({"r": 5}, "rank 4, but r or rank_pattern say 5"),
    ({"lora_alpha": "x"}, "damaged: must be real number"),
    ({"lora_dropout": 2}, "dropout=2"),
    ({"bias": "some"}, "train_bias='some'"),
    ({"alpha_pattern": {"(": 2}}, "damaged"),
    ({"rank_pattern": 3}, "damaged"),
    ({"modules_to_save": "head"}, "damaged"),
    ({"modules_to_save": ["patch_embed"]}, "head.weight has no place"),
]


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"])
    shaken(peft.get_peft_model(built(timm_vit), config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_what_does_not_exist_here_is_refused_by_name(changes, told, peft_folder, tmp_path):
    about = json.loads((peft_folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, **changes}))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (peft_folder / "adapter_model.safetensors").read_bytes()
    )
    model = built(timm_vit)
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load_adapter(model, tmp_path)
    assert told in str(caught.value)
    assert not hasattr(model, "lora_state")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.pop("base_model.model.blocks.0.attn.qkv.lora_B.weight"),
            "blocks.0.attn.qkv: has A alone",
        ),
        (lambda t: t.pop("base_model.model.head.bias"), "head.bias is missing"),
        (lambda t: t.update({"base_model.model.blocks.0.norm1.lora_X": torch.ones(1)}), "means nothing here"),
        (lambda t: t.update({"base_model.model.norm.weight": torch.ones(24)}), "norm.weight has no place"),
        (
            lambda t: t.update({"base_model.model.blocks.0.attn.qkv.lora_B.weight": torch.ones(72, 3)}),
            "do not belong together",
        ),
        (
            lambda t: t["base_model.model.blocks.0.attn.qkv.lora_B.weight"].fill_(float("nan")),
            "blocks.0.attn.qkv.lora_B holds NaN",
        ),
        (lambda t: t.clear(), "it holds no LoRA tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, told, peft_folder, tmp_path):
    tensors = load_file(peft_folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((peft_folder / "adapter_config.json").read_text())
    model = built(timm_vit)
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.load_adapter(model, tmp_path)
    assert not hasattr(model, "lora_state")


def test_the_attention_of_an_unknown_peft_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["self_attention"])
    peft.get_peft_model(built(torchvision_vit), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "0.22.0"}))
    with pytest.raises(ll.AdapterFileError, match=r"peft_version='0.22.0'.*out_proj twice"):
        ll.load_adapter(built(torchvision_vit), tmp_path)


def test_a_lightning_module_is_saved_as_its_network_and_takes_peft_back(tmp_path):
    from small import Classifier

    module = Classifier(built(timm_vit))
    ll.inject(module, ll.LoRAConfig(rank=4))
    x = BATCHES[timm_vit]()
    expected = logits(shaken(module), x)
    ll.save_adapter(module, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(built(timm_vit), tmp_path)
    assert (logits(theirs, x) - expected).abs().max() < 1e-6
    again = Classifier(built(timm_vit))
    ll.load_adapter(again, tmp_path)
    assert (logits(again, x) - expected).abs().max() < 1e-6


def test_names_that_are_endings_of_others_are_told_apart(tmp_path):
    """PEFT compares endings: `fc` would also be `block.fc`, and `head` also `box.head`."""

    def build():
        inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "head": nn.Linear(6, 6)})
        return Named(nn.Linear(6, 6), inner, nn.Linear(6, 3))

    model = built(build)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=r"fc|block\.head", modules_to_save="head"))
    assert model.lora_state.plan.heads == ["head"]
    x = torch.randn(4, 6)
    expected = logits(shaken(model), x)
    ll.save_adapter(model, tmp_path, format="peft")
    assert (logits(peft.PeftModel.from_pretrained(built(build), tmp_path), x) - expected).abs().max() < 1e-6


class Named(nn.Module):
    def __init__(self, fc, block, head) -> None:
        super().__init__()
        self.fc, self.block, self.head = fc, block, head

    def forward(self, x):
        x = self.block["fc"](self.fc(x).relu()).relu()
        return self.head(self.block["head"](x))


def test_the_saved_files_are_as_peft_writes_them(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.save_adapter(ll_injected(timm_vit), tmp_path, format="peft")
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    known = peft.LoraConfig(target_modules=["x"]).to_dict().keys() | {"auto_mapping"}
    assert about.keys() <= known
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.attn.qkv.lora_A.weight" in names
    assert "base_model.model.head.weight" in names


class Foreign(nn.Module):
    """Layers that PEFT adapts in another way than by their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.grouped = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.dilated = nn.Conv1d(4, 4, 3, padding="same", dilation=2)
        self.reflected = nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_modules": ["grouped"]}, "grouped: a convolution in 2 groups"),
        ({"target_modules": ["dilated"]}, "dilated: dilation 2, which PEFT leaves out"),
        ({"target_modules": ["reflected"]}, "reflected: padding_mode 'reflect', which PEFT"),
        ({"target_modules": ["table"], "use_dora": True}, "table: DoRA of a weight of .in, out. does not"),
    ],
)
def test_layers_that_peft_computes_otherwise_are_refused(options, told, tmp_path):
    peft.get_peft_model(built(Foreign), peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path)
    model = built(Foreign)
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.load_adapter(model, tmp_path)
    assert not hasattr(model, "lora_state")


def test_peft_reads_files_with_what_travels(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    base = {n: t.clone() for n, t in model.state_dict().items()}
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    ll.save_adapter(model, tmp_path, format="peft", origin={"facts": {"class_names": ["a", "b", "c"]}})
    ll.eject(model)
    model.load_state_dict(base)
    assert isinstance(peft.PeftModel.from_pretrained(model, tmp_path), peft.PeftModel)
    assert read_source(tmp_path).facts() == {"class_names": ["a", "b", "c"]}
