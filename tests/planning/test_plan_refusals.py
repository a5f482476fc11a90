"""What cannot be adapted is refused at plan time, by name, with what would work instead."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

import lora_lightning as ll


class Holder(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)


def packed(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})[0]


def gptq() -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    return layer


IN_FLOATS = "load the model in float32, float16 or bfloat16, and call lora_lightning.quantize"
REFUSED = {
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "Bilinear is not linear in one input"),
    "int8": (lambda: Holder(torch.int8), f"its weight is int8: {IN_FLOATS}"),
    "float8": (lambda: Holder(torch.float8_e4m3fn), f"its weight is float8_e4m3fn: {IN_FLOATS}"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "its weight is complex64: LoRA here"),
    "dynamic Linear": (lambda: packed(nn.Linear(4, 4)), f"its weight is quantized: {IN_FLOATS}"),
    "dynamic LSTM": (lambda: packed(nn.LSTM(4, 4)), f"its weight is quantized: {IN_FLOATS}"),
    "dynamic LSTMCell": (lambda: packed(nn.LSTMCell(4, 4)), f"its weight is quantized: {IN_FLOATS}"),
    "gptq": (gptq, f"its weight is quantized: {IN_FLOATS}"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "build it with max_norm=None"),
    "bag max_norm": (lambda: nn.EmbeddingBag(4, 4, max_norm=1.0), "build it with max_norm=None"),
    "old weight_norm": (
        lambda: weight_norm(nn.Linear(4, 4)),
        "use torch.nn.utils.parametrizations.weight_norm",
    ),
    "old weight_norm LSTM": (
        lambda: weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
        "makes its weight_hh_l0 anew in every forward: use torch.nn.utils.parametrizations.weight_norm",
    ),
    "old spectral_norm": (
        lambda: spectral_norm(nn.Conv1d(4, 4, 3)),
        "use torch.nn.utils.parametrizations.spectral_norm",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(quantization is deprecated|weight_norm. is deprecated)")
@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_layers_that_are_refused(build, reason):
    model = nn.ModuleDict({"odd": build(), "fine": nn.Linear(4, 4)})
    config = {"rank": 2, "modules_to_save": None}
    with pytest.raises(ll.ConfigError, match=re.escape(reason)) as error:
        ll.inject(model, ll.LoRAConfig(**config, target_modules=["odd"]))
    assert "matches odd (" in str(error.value) and "cannot be adapted" in str(error.value)
    planned = ll.plan(model, ll.LoRAConfig(**config, target_modules="all"))
    assert [p.name for p in planned.layers] == ["fine"]
    assert reason in planned.skipped["odd"]  # told, not passed over
    alone = nn.ModuleDict({"odd": build()})
    for targets in ("auto", "all"):
        with pytest.raises(ll.ConfigError, match=re.escape(reason)):
            ll.plan(alone, ll.LoRAConfig(**config, target_modules=targets))


@pytest.mark.parametrize("targets", ["auto", "all", ["0"], ["1"]])
def test_a_model_whose_shapes_are_not_known_yet_is_refused(targets):
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    config = ll.LoRAConfig(rank=2, target_modules=targets)
    with pytest.raises(ll.ConfigError, match=r"shapes of 1.weight, 1.bias are not known yet: run one batch"):
        ll.inject(model, config)
    with pytest.raises(ll.ConfigError, match="run one batch"):
        ll.linear_probe(model)
    model(torch.randn(2, 4))
    ll.plan(model, ll.LoRAConfig(rank=2, target_modules=["0"]))


LAYERS = {
    "embedding": lambda: nn.Embedding(4, 4),
    "bag": lambda: nn.EmbeddingBag(4, 4),
    "lstm": lambda: nn.LSTM(4, 4),
    "cell": lambda: nn.GRUCell(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transposed": lambda: nn.ConvTranspose1d(4, 4, 3),
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "normed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}
NO_DROPOUT = {"embedding", "bag", "lstm", "cell", "attention", "normed"}
NO_DORA = {"embedding", "bag", "transposed"}


def problem_of(name: str, **options) -> str:
    model = nn.ModuleDict({name: LAYERS[name]()})
    try:
        ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None, **options))
    except ll.ConfigError as error:
        assert not any("LoRA" in type(m).__name__ for m in model.modules())
        return str(error)
    return ""


def test_dropout_of_an_output_projection_that_attention_reads():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ll.ConfigError, match=r"dropout=0\.1: attention\.out_proj are read"):
        ll.plan(model, ll.LoRAConfig(target_modules=["out_proj"], modules_to_save=None, dropout=0.1))


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_where_it_cannot_act(name):
    problem = problem_of(name, dropout=0.1)
    assert bool(problem) == (name in NO_DROPOUT)
    if problem:
        assert f"dropout=0.1: {name}" in problem
        assert "set dropout to 0, or name them in exclude_modules" in problem


@pytest.mark.parametrize("name", LAYERS)
def test_dora_where_outputs_have_no_row_of_the_weight(name):
    problem = problem_of(name, use_dora=True)
    assert bool(problem) == (name in NO_DORA)
    if problem:
        assert f"use_dora=True: {name}" in problem
        assert "set use_dora to false, or name them in exclude_modules" in problem


def test_several_problems_are_told_together():
    model = nn.ModuleDict({n: build() for n, build in LAYERS.items()})
    config = {"rank": 3, "target_modules": ["all-linear", "transposed", "lstm", "linear"]}
    with pytest.raises(ll.ConfigError) as error:
        ll.plan(model, ll.LoRAConfig(**config, dropout=0.1, use_dora=True, modules_to_save=["hed"]))
    assert len(error.value.problems) == 4
    text = str(error.value)
    assert "Did you mean 'all'?" in text and "modules_to_save: 'hed'" in text
    assert "dropout=0.1: lstm.weight_ih_l0, lstm.weight_hh_l0 are" in text
    assert "use_dora=True: transposed has" in text or "use_dora=True: transposed have" in text


@pytest.mark.parametrize(("target", "head"), [("table", "out"), ("out", "table")])
def test_a_target_that_is_tied_to_a_trained_head(target, head):
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False)})
    model["out"].weight = model["table"].weight
    config = ll.LoRAConfig(rank=2, target_modules=[target], modules_to_save=[head])
    with pytest.raises(ll.ConfigError, match=rf"weight of {target} is tied to {head}.weight, which trains"):
        ll.plan(model, config)
