"""What PEFT's users type: its names, its LoraConfig, and mappings where a LoRAConfig belongs."""

import dataclasses
import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI
from small import Classifier, mlp, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.app.command_line import CommandLine
from lora_lightning.layers.registry import lora_layers
from lora_lightning.utils.peft_names import NAMES

peft = pytest.importorskip("peft")

SAME = {"target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"} | {
    "use_rslora", "use_dora",
}  # fmt: skip
TYPED = [
    ("r", 4, "rank=4"),
    ("lora_alpha", 16, "alpha=16"),
    ("lora_dropout", 0.1, "dropout=0.1"),
    ("bias", "all", "train_bias='all'"),
    ("init_lora_weights", "gaussian", "init='gaussian'"),
    ("init_lora_weights", "olora", "init='olora'"),
    ("init_lora_weights", "pissa_niter_4", "init='pissa_fast'"),
    ("init_lora_weights", "eva", "init='eva', and rank='auto'"),
    ("init_lora_weights", "corda", "init='default', or"),
    ("layers_to_transform", [1, 3], "target_modules=['*.1.*', '*.3.*']"),
    ("layers_pattern", "blocks", "target_modules=['blocks.0.*']"),
    ("fan_in_fan_out", True, "leave it out"),
    ("task_type", "SEQ_CLS", "modules_to_save='auto'"),
]


def refusal(make, *values, **options) -> list[str]:
    with pytest.raises(ll.ConfigError) as caught:
        make(*values, **options)
    return caught.value.problems


def test_every_field_of_peft_is_an_option_or_has_an_answer():
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert {*NAMES} == fields - SAME
    assert {f.name for f in dataclasses.fields(ll.LoRAConfig)} >= SAME


@pytest.mark.parametrize("make", [ll.LoRAConfig, ll.LoRACallback])
@pytest.mark.parametrize(("name", "value", "ours"), TYPED)
def test_a_name_of_peft_is_answered_with_ours(make, name, value, ours):
    (problem,) = refusal(make, **{name: value})
    assert problem.startswith(f"{name}={value!r} is PEFT's: ")
    assert ours in problem


def test_all_of_them_come_in_one_message():
    options = {name: value for name, value, _ in TYPED} | {
        "rank": 0,
        "rnk": 3,
        "target_modules": "all-linear",
    }
    problems = refusal(ll.LoRAConfig, **options)
    assert len(problems) == len(options)
    assert any("here 'all' is every supported layer" in p for p in problems)
    assert any("Did you mean 'rank'?" in p for p in problems)


def test_a_misspelt_option_of_the_callback_is_compared_with_its_own():
    (problem,) = refusal(ll.LoRACallback, adaptr="x")
    assert "Did you mean 'adapter'?" in problem


def test_on_a_command_line_the_answer_can_be_typed():
    words = ["lora.r=4", "+lora.lora_alpha=16", "lora_dropout=0.1", "lora.target_modules=all-linear"]
    problems = "\n".join(refusal(CommandLine(words).check))
    for theirs, ours in [
        ("r=4", "rank=4"),
        ("lora_alpha=16", "alpha=16"),
        ("lora_dropout=0.1", "dropout=0.1"),
    ]:
        assert f"lora.{theirs} is PEFT's: here it is lora.{ours}." in problems
    assert "lora.target_modules=all-linear is PEFT's" in problems


def test_lightning_cli(tmp_path, monkeypatch):
    class Owner(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())

    monkeypatch.chdir(tmp_path)
    words = ["app", "--trainer.logger=false", "--trainer.callbacks=lora_lightning.LoRACallback"]
    own = "--trainer.callbacks.init_args"
    monkeypatch.setattr(sys, "argv", [*words, f"{own}.r=8", f"{own}.lora_alpha=16"])
    with pytest.raises((ValueError, SystemExit)) as caught:
        LightningCLI(Owner, run=False, save_config_callback=None)
    assert "r=8 is PEFT's: here it is rank=8." in str(caught.value)
    assert "lora_alpha=16 is PEFT's: here it is alpha=16." in str(caught.value)
    monkeypatch.setattr(sys, "argv", [*words, f"{own}.rank=3", f"{own}.rank_pattern={{qkv: 2}}"])
    cli = LightningCLI(Owner, run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, ll.LoRACallback))
    assert callback.config == ll.LoRAConfig(rank=3, rank_pattern={"qkv": 2})


@pytest.mark.parametrize("form", ["object", "dictionary"])
def test_pefts_config_is_converted(form):
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["qkv", "fc1"], lora_dropout=0.1, bias="lora_only", use_rslora=True,
        modules_to_save=["head"], rank_pattern={"blocks.0.attn.qkv": 2}, init_lora_weights="gaussian",
    )  # fmt: skip
    ours = ll.LoRAConfig(
        rank=4, alpha=6, target_modules=["fc1", "qkv"], dropout=0.1, train_bias="lora_only", use_rslora=True,
        modules_to_save=["head"], rank_pattern={"blocks.0.attn.qkv": 2}, init="gaussian",
    )  # fmt: skip
    given = theirs if form == "object" else theirs.to_dict()
    assert ll.LoRACallback(given).config == ours
    model = vit()
    ll.inject(model, given)
    adapted = peft.get_peft_model(vit(), theirs).base_model.model
    theirs = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A") and "." in n}
    updates = {n: next(iter(layer.lora["default"].values())) for n, layer in lora_layers(model).items()}
    assert {n: u.rank for n, u in updates.items()} == {n: m.r["default"] for n, m in theirs.items()}
    assert {n: u.scaling for n, u in updates.items()} == {n: m.scaling["default"] for n, m in theirs.items()}


def test_with_a_task_type_the_head_is_trained():
    def heads(**options):
        return ll.LoRACallback(peft.LoraConfig(task_type="SEQ_CLS", **options)).config.modules_to_save

    assert heads() == "auto"
    assert heads(modules_to_save=["classifier"]) == ["classifier"]
    assert "beside modules_to_save=['pooler']" in refusal(heads, modules_to_save=["pooler"])[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_modules": "all-linear"}, ["target_modules='all-linear'"]),
        ({"target_modules": ["a"], "layers_to_transform": [1]}, ["target_modules=['*.1.*']"]),
        ({"init_lora_weights": False, "lora_bias": True}, ["begin at zero", "lora_bias=True"]),
        ({"init_lora_weights": "mica"}, ["no such beginning"]),
        ({"rank_pattern": {"a": 2, "b.a": 4}}, ["PEFT takes the first"]),
        ({"rank_pattern": {"a": 2, ".*a": 4}, "inference_mode": True}, ["takes the first", "nothing would"]),
    ],
)
def test_what_has_no_equivalent_is_refused_at_once(options, told):
    problems = refusal(ll.LoRACallback, peft.LoraConfig(**options))
    assert len(problems) == len(told)
    for text in told:
        assert any(text in problem for problem in problems)


def test_another_method_of_peft():
    (problem,) = refusal(ll.LoRACallback, peft.LoHaConfig())
    assert "peft_type='LOHA'" in problem


@pytest.mark.parametrize("use", ["plan", "inject", "linear_probe", "add_adapter", "callback"])
def test_wherever_a_config_belongs(use):
    """A mapping of our fields is one, names of PEFT in it are answered, other things refused."""

    def call(config):
        model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
        if use == "callback":
            return ll.LoRACallback(config)
        if use == "add_adapter":
            ll.inject(model, ll.LoRAConfig(target_modules=["0"]))
            return ll.add_adapter(model, "second", config)
        return {"plan": ll.plan, "inject": ll.inject, "linear_probe": ll.linear_probe}[use](model, config)

    call({"rank": 2, "target_modules": ["0"], "modules_to_save": ["1"]})
    call(peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert "here it is rank=2" in refusal(call, {"r": 2})[0]
    assert "give a LoRAConfig" in refusal(call, "qkv")[0]


def test_a_list_of_adapters_to_select():
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    ll.inject(model, ll.LoRAConfig(target_modules=["0"]), adapter="a")
    ll.add_adapter(model, "b")
    with pytest.raises(ll.UserError, match=r"one by one, as in set_adapter\(model, 'a', 'b'\)"):
        ll.set_adapter(model, ["a", "b"])
    for wrong in (ll.delete_adapter, ll.set_adapter, ll.add_adapter):
        with pytest.raises(ll.UserError, match=r"\{'a': 1\}"):
            wrong(model, {"a": 1})
    assert ll.adapter_names(model) == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: ll.mixed_adapters(m, [["a"], "b"]).__enter__(), r"no adapter \['a'\]"),
        (lambda m: ll.combine(m, ["a", "b"], 1.0, "c"), "weights=1.0: give a list"),
        (lambda m: ll.combine(m, ["a", "b"], [1, 1], ["c"]), r"into=\['c'\]: give an identifier"),
        (lambda m: ll.add_adapter(m, "a-b"), "adapter='a-b': give an identifier"),
        (lambda m: ll.quantize(mlp(), ["nf4"]), r"kind=\['nf4'\]: give one of"),
        (lambda m: ll.LoRACallback(adapter="a-b"), "adapter='a-b': give an identifier"),
        (lambda m: ll.LoRACallback(verbose="yes"), "verbose='yes': give true or false"),
    ],
)
def test_other_lists_and_names_where_none_belong(call, told):
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    ll.inject(model, ll.LoRAConfig(target_modules=["0"]), adapter="a")
    ll.add_adapter(model, "b")
    with pytest.raises(ll.UserError, match=told):
        call(model)
    assert ll.adapter_names(model) == ["a", "b"]


def test_the_trainer_never_sees_a_config_that_is_none():
    with pytest.raises(ll.ConfigError, match="config=8: give a LoRAConfig"):
        pl.Trainer(callbacks=[ll.LoRACallback(8)], logger=False)
