"""Which layers are taken for the head, and what "auto" leaves, on models that once misled it."""

import pytest
import torch
from small import vit
from torch import nn

import lora_lightning as ll
from lora_lightning.planning.heads import find_heads


def plan(model: nn.Module, **options) -> ll.Plan:
    return ll.plan(model, ll.LoRAConfig(**{"rank": 2, **options}))


def named(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def block(size: int = 8) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 16), nn.GELU(), nn.Linear(16, size))


def test_a_hidden_layer_called_fc_is_no_head_when_the_output_comes_later():
    model = named(first=named(fc=nn.Linear(8, 8)), rnn=nn.LSTM(8, 8), out=nn.Linear(8, 3))
    assert find_heads(model) == ["out"]
    assert "first.fc" in [p.name for p in plan(model).layers]


def test_of_a_detectors_head_only_the_outputs_train_in_full():
    tower = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    head = named(conv=tower, cls_logits=nn.Conv2d(8, 3, 3), bbox_reg=nn.Conv2d(8, 4, 3))
    model = named(body=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), head=head)
    planned = plan(model)
    assert planned.heads == ["head.cls_logits", "head.bbox_reg"]
    assert [p.name for p in planned.layers] == ["body.1", "head.conv.0", "head.conv.2"]


def test_the_layers_of_an_auxiliary_classifier_stand_one_after_the_other():
    model = named(
        body=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)),
        aux1=named(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 3)),
        fc=nn.Linear(8, 3),
    )
    assert find_heads(model) == ["aux1.fc2", "fc"]


@pytest.mark.parametrize(("channels", "heads"), [(3, ["4"]), (8, [])])
def test_a_last_convolution_is_a_head_when_it_narrows(channels, heads):
    layers = [nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, channels, 1)]
    assert find_heads(nn.Sequential(*layers)) == heads


def test_an_encoder_without_output_layer_has_no_head():
    model = named(projection=nn.Linear(4, 8), layers=nn.ModuleList([block(), block()]))
    planned = plan(model)
    assert planned.heads == []
    assert planned.skipped == {"projection": "before the blocks"}


def test_a_backbone_followed_by_a_head():
    model = nn.Sequential(vit(), nn.Linear(3, 2))
    model[0].reset_classifier(0)
    planned = plan(model)
    assert planned.heads == ["1"]
    assert planned.skipped == {"0.patch_embed.proj": "the stem"}
    assert len(planned.layers) == 8


def tied() -> nn.Module:
    model = named(embed=nn.Embedding(20, 8), layers=nn.ModuleList([block(), block()]))
    model.lm_head = nn.Linear(8, 20, bias=False)
    model.lm_head.weight = model.embed.weight
    return model


def test_an_output_layer_tied_to_an_embedding_stays_frozen():
    planned = plan(tied())
    assert planned.heads == []
    assert planned.skipped["lm_head"] == "tied to an embedding"


def test_an_output_layer_tied_to_another_layer_stays_frozen():
    model = nn.ModuleDict({"inner": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert ll.plan(model).heads == ["head"]
    model["head"].weight = model["inner"].weight
    assert ll.plan(model).heads == []


def test_a_tied_output_layer_trains_when_it_is_named():
    model = tied()
    planned = ll.inject(model, ll.LoRAConfig(rank=2, modules_to_save=["lm_head"]))
    assert model.lm_head.weight.requires_grad
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    original = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with ll.adapters_off(model):
        assert torch.equal(model.lm_head.weight, original)
