"""A small base, and an adapter of it whose values a seed gives, in a folder."""

import torch
from small import mlp

import lora_lightning as ll


def base():
    torch.manual_seed(0)
    return mlp()


def adapter(folder, seed, format="lora_lightning", **options):
    model = base()
    ll.inject(model, ll.LoRAConfig(**{"rank": 2, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    ll.save_adapter(model, folder, format=format)
    return {n: t.clone() for n, t in ll.lora_state_dict(model).items()}
