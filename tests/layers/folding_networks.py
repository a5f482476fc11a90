"""Small networks with frozen norms behind their convolutions, for the tests of folding."""

import copy

import torch
from torch import nn

import lora_lightning as ll

EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Block(nn.Module):
    """Convolution, norm, activation, twice; beside them a way around."""

    def __init__(self, i, o, stride=1, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=options.pop("bias", False), **options)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.act = nn.ReLU(inplace=True)
        self.around = nn.Sequential(nn.Conv2d(i, o, 1, stride=stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.around(x))


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(Block(4, 8, **options), Block(8, 8, 2), nn.Flatten(), nn.Linear(8 * 9, 3))
    return randomized(model)


def randomized(model):
    for module in model.modules():
        if hasattr(module, "running_var"):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()  # negative scales too
            module.running_var.uniform_(0.5, 2)
    return model.double()


def adapted(model, fold, **options):
    model = copy.deepcopy(model)
    settings = {"rank": 2, "target_modules": r".*(conv\d|around\.0)", "modules_to_save": None, **options}
    torch.manual_seed(1)
    ll.inject(model, ll.LoRAConfig(fold_norms=fold, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def step(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y, x.grad, *[p.grad for p in model.parameters() if p.requires_grad]


def agree(one, other, x=None, tolerance=EXACT):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64) if x is None else x
    for got, wanted in zip(step(one, x), step(other, x), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)
