"""Models of two adapters, and of each of them alone, whose values are the same."""

import torch
from small import cnn, encoder, mlp, vit
from torch import nn

import lora_lightning as ll

MODELS = [mlp, cnn, vit, encoder]
# Other ranks, layers, kinds of update and own values than the first adapter's.
OTHERS = {
    "rank": {"rank": 3},
    "dora": {"rank": 2, "use_dora": True},
    "own": {"rank": 2, "train_norm": "both", "train_bias": "all"},
    "all": {"rank": 1, "target_modules": "all", "modules_to_save": None},
}


@torch.no_grad()
def train(model: nn.Module, seed: int) -> None:
    """Give whatever trains now values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    own = set(model.lora_state.adapters[model.lora_state.adapter].extra_trainables)
    for name, buffer in model.named_buffers():
        if name in own and buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator))


def alone(build, name: str, seed: int, **options) -> nn.Module:
    """A model with this adapter only."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(seed)
    ll.inject(model, ll.LoRAConfig(**options), adapter=name)
    train(model, seed)
    return model.eval()


def two(build, **options) -> nn.Module:
    """A model with the adapters "one" (rank 2) and "two", whose values are those of `alone`."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(1)
    ll.inject(model, ll.LoRAConfig(rank=2), adapter="one")
    train(model, 1)
    torch.manual_seed(2)
    ll.add_adapter(model, "two", ll.LoRAConfig(**options))
    ll.set_adapter(model, "two")
    train(model, 2)
    ll.set_adapter(model, "one")
    return model.eval()


def flags(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}
