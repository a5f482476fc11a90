"""verify finds what it promises to find, and nothing in a sound model."""

import pytest
import torch
from small import BATCHES, adapted, cnn, encoder, mlp, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels.functional import lora_linear


@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"train_norm": "both"}])
def test_a_sound_model_passes_and_is_not_touched(build, options):
    model = build()
    ll.inject(model, ll.LoRAConfig(rank=2, **options))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert ll.verify(model, BATCHES[build]()) == []
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_head_that_begins_at_zero_hides_nothing():
    """As a fresh one over pretrained weights does: no gradient would pass it."""
    model = vit()
    for parameter in model.get_classifier().parameters():
        nn.init.zeros_(parameter)
    ll.inject(model, ll.LoRAConfig(rank=2))
    assert ll.verify(model, BATCHES[vit]()) == []


def test_a_layer_that_is_never_used_is_named():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    failures = ll.verify(model, torch.randn(2, 4))
    assert failures == [f"in {m} mode no gradient reaches the updates of spare" for m in ("train", "eval")]


def test_a_frozen_tensor_that_moves_is_named():
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            if self.training:
                self.layer.bias.data += 0.1
            return self.head(self.layer(x))

    model = Moves()
    ll.inject(model, ll.LoRAConfig(rank=2))
    assert ll.verify(model, torch.randn(2, 4)) == ["frozen, but a training step changed layer.bias"]


def test_a_layer_whose_branch_disagrees_with_its_weight_is_found(monkeypatch):
    model = adapted(mlp)

    def doubled(x, W, bias, A, B, scaling, **options):
        return lora_linear(x, W, bias, A, B, 2 * scaling, **options)

    monkeypatch.setattr("lora_lightning.layers.linear.lora_linear", doubled)
    assert any("merged outputs differ" in failure for failure in ll.verify(model, torch.randn(2, 6)))


def test_an_adapter_that_cannot_be_switched_off_is_found():
    class Sticky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            extra = sum(p.sum() for n, p in self.named_parameters() if "lora_B" in n)
            return self.head(self.layer(x)) + extra

    model = Sticky()
    ll.inject(model, ll.LoRAConfig(rank=2))
    assert "with adapters off the outputs are not the base model's" in ll.verify(model, torch.randn(2, 4))


def test_batches_of_every_form():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return {"logits": [self.b(self.a(x + y))], "count": torch.ones(1, dtype=torch.long)}

    model = Two()
    ll.inject(model, ll.LoRAConfig(rank=2))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert ll.verify(model, (x, y)) == ll.verify(model, {"x": x, "y": y}) == []
