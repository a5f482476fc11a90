"""Models with several adapters of all sorts, each sample's outputs one by one, and what must not change."""

import torch
from small import BATCHES
from torch import nn

import lora_lightning as ll

SAMPLES = ["one", None, "two", "three", "one", "two"]
CONFIGS = {
    "one": {"rank": 2},
    "two": {"rank": 3, "train_norm": "both", "train_bias": "all"},
    "three": {"rank": 1, "target_modules": "all", "modules_to_save": None, "use_dora": True},
}


@torch.no_grad()
def several(build, selected=("one",), **changed) -> nn.Module:
    """A model with the adapters of CONFIGS, in which everything that they train has been changed."""
    torch.manual_seed(0)
    model = build().eval()
    for i, (name, options) in enumerate(CONFIGS.items()):
        config = ll.LoRAConfig(**{**options, **changed})
        if i:
            ll.add_adapter(model, name, config)
            ll.set_adapter(model, name)
        else:
            ll.inject(model, config, adapter=name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        own = set(model.lora_state.adapters[name].extra_trainables)
        for n, buffer in model.named_buffers():
            if n in own and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    ll.set_adapter(model, *selected)
    return model


def each_alone(model: nn.Module, x: torch.Tensor, samples=SAMPLES, dim: int = 0) -> torch.Tensor:
    selected = model.lora_state.active
    outputs = []
    for i, name in enumerate(samples):
        sample = x.narrow(dim, i, 1)
        if name is None:
            with ll.adapters_off(model):
                outputs.append(model(sample))
        else:
            ll.set_adapter(model, name)
            outputs.append(model(sample))
    ll.set_adapter(model, *selected)
    return torch.cat(outputs, dim)


def batch(build, n: int = len(SAMPLES)) -> torch.Tensor:
    return torch.randn(n, *BATCHES[build]().shape[1:])


def snapshot(model: nn.Module):
    state = {n: (t, t.clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    return state, {n: (type(m), {*m.__dict__}) for n, m in model.named_modules()}


def assert_unchanged(model: nn.Module, before) -> None:
    state, modules = before
    now = model.state_dict(keep_vars=True)
    assert all(now[n] is t and torch.equal(t, v) and t.requires_grad == r for n, (t, v, r) in state.items())
    assert {n: (type(m), {*m.__dict__}) for n, m in model.named_modules()} == modules
    assert torch.backends.mha.get_fastpath_enabled()
