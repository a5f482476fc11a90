"""One case a setting of a layer family, and the reference maths that every case is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import lora_lightning as ll
from lora_lightning.layers.registry import lora_layers


def plainly(layer: nn.Module, *inputs: Tensor) -> Any:
    return layer(*inputs)


@dataclass(frozen=True)
class Case:
    """A layer and how it is used.

    Attributes:
        layer: builds it; it is called "layer" in its model.
        shapes: of the float inputs, made anew for each test; or a function that makes all the inputs.
        call: what the model does with its layer.
        targets: `target_modules`.
        options: other fields of LoRAConfig.
        batch: dimension of the batch in every input and output, or None where there is none.
    """

    layer: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] | Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Any] = plainly
    targets: tuple[str, ...] = ("layer",)
    options: dict[str, Any] = field(default_factory=dict)
    batch: int | None = 0

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        made = self.shapes() if callable(self.shapes) else tuple(torch.randn(*shape) for shape in self.shapes)
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in made)


class Model(nn.Module):
    """A model of one layer. It knows its case by name, so that it pickles."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = CASES[name].layer()

    def layer_dtype(self) -> torch.dtype:
        return next(self.layer.parameters()).dtype

    def forward(self, *inputs: Tensor) -> Any:
        return CASES[self.name].call(self.layer, *inputs)


def config(name: str, **options: Any) -> ll.LoRAConfig:
    case = CASES[name]
    settings = {"rank": 2, "target_modules": list(case.targets), "modules_to_save": None}
    return ll.LoRAConfig(**{**settings, **case.options, **options})


def base_model(name: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(name).to(dtype)


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """A model whose updates all change something."""
    model = base_model(name, dtype)
    ll.inject(model, config(name, **options))
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every update values; the row of `padding_idx`, which never trains, keeps its zero."""
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        padding = getattr(layer, "padding_idx", None)
        for parameter in layer.lora.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(1.2)  # DoRA's magnitude
        if padding is not None:
            layer.lora["default"]["weight"].lora_A[:, padding] = 0


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The float outputs, with the same random numbers in every call."""
    torch.manual_seed(7)
    return list(floats(model(*inputs)))


def floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from floats(item)


def loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs]).sum()


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def same_flags(name: str, model: nn.Module) -> nn.Module:
    """The base model with the `requires_grad` flags of the adapted one: flags alone can make torch take
    another kernel, with and without gradients."""
    base = base_model(name, model.layer_dtype()).train(model.training)
    own = {n: p for n, p in model.named_parameters() if ".lora." not in n}
    for parameter_name, parameter in base.named_parameters():
        parameter.requires_grad_(own[parameter_name].requires_grad)
    for module in base.modules():
        if isinstance(module, _SpectralNorm):  # frozen, it no longer iterates in train mode
            module.eval()
    return base


def reference(name: str, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """An independent plain model, and the weights W + s·B·A (times DoRA's factors) to put into it.

    Written here with sums over the indices, not with the package's code; the weights are functions of
    the adapted model's A and B, so that gradients reach these.
    """
    plain = base_model(name, model.layer_dtype()).requires_grad_(False).eval()
    for module in list(plain.modules()):
        if is_parametrized(module):
            for parameter in list(module.parametrizations):
                remove_parametrizations(module, parameter)
                setattr(module, parameter, nn.Parameter(getattr(module, parameter), requires_grad=False))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # sums have no sparse gradients
    weights: dict[str, Tensor] = {}
    for layer_name, layer in lora_layers(model).items():
        for update in layer.lora["default"].values():
            slot = update.slot
            key = f"{layer_name}.{slot.parameter}"
            W = weights.get(key, plain.get_parameter(key).detach())
            first, last = slot.out_range or (0, W.shape[0])
            rows = slice(first, last)
            rank, alpha = update.rank, 2 * update.rank
            scaling = alpha / rank**0.5 if model.lora_state.config.use_rslora else alpha / rank
            product = scaling * by_groups(update.lora_A, update.lora_B, rank, slot.transposed)
            changed = W[rows] + product.reshape(W[rows].shape)
            if update.lora_magnitude is not None:
                norms = changed.detach().pow(2).flatten(1).sum(1).sqrt()
                shape = (-1, *[1] * (W.dim() - 1))
                changed = changed * (update.lora_magnitude / norms).view(shape)
            weights[key] = torch.cat([W[:first], changed, W[last:]])
    return plain, weights


def by_groups(A: Tensor, B: Tensor, rank: int, transposed: bool) -> Tensor:
    """Each group's product of its own r rows of A and its own share of B, one under the other."""
    groups = A.shape[0] // rank
    parts = []
    for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True):
        if transposed:
            parts.append(torch.einsum("ri,ro->io", a.flatten(1), b.flatten(1)))
        else:
            parts.append(torch.einsum("or,ri->oi", b, a.flatten(1)))
    return torch.cat(parts)


def reference_run(
    plain: nn.Module, weights: dict[str, Tensor], inputs: tuple[Tensor, ...], train: bool
) -> list[Tensor]:
    plain.train(train)
    torch.manual_seed(7)
    return list(floats(torch.func.functional_call(plain, weights, inputs)))


# --- the cases -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A user's class with a weight and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight / 3).t()


class Cosine(nn.Linear):
    """A subclass of a known class with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class Standardized(nn.Conv2d):
    """A convolution that changes its weight in `_conv_forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1), bias)


def timm_layer(name: str, *args: Any, **options: Any) -> nn.Module:
    import timm.layers

    return getattr(timm.layers, name)(*args, **options)


def timm_attention() -> nn.Module:
    from timm.layers import Attention

    return Attention(8, num_heads=2, qkv_bias=True)


def transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)  # 6 -> 5


def indices(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.arange(torch.Size(shape).numel()).view(shape) * 3 % 7,)


def attend(layer: nn.Module, *inputs: Tensor) -> Any:
    query, key, value = (inputs * 3)[:3]
    return layer(query, key, value)


def attend_masked(layer: nn.Module, x: Tensor) -> Any:
    mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    return layer(x, x, x, attn_mask=mask, need_weights=False)


def attend_padded(layer: nn.Module, x: Tensor) -> Any:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, -2:] = True
    return layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)


def attach_adapter(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, output_size=[2 * size for size in x.shape[2:]])


def packed(layer: nn.Module, x: Tensor) -> Any:
    lengths = torch.arange(x.shape[0]) % x.shape[1] + 1
    return layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))


def with_state(layer: nn.Module, x: Tensor, *state: Tensor) -> Any:
    return layer(x, state if len(state) > 1 else state[0])


def weigh(layer: nn.Module, i: Tensor, weights: Tensor) -> Tensor:
    return layer(i, per_sample_weights=weights)


CONV = {
    "Conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), ((2, 4, 9),)),
    "Conv1d-same-circular": Case(
        lambda: nn.Conv1d(4, 6, 4, dilation=2, padding="same", padding_mode="circular"), ((2, 4, 9),)
    ),
    "Conv1d-groups": Case(
        lambda: nn.Conv1d(4, 6, 3, groups=2, padding="valid", bias=False), ((2, 4, 9),), options={"rank": 3}
    ),
    "Conv1d-depthwise": Case(lambda: nn.Conv1d(4, 4, 3, groups=4, padding="same"), ((2, 4, 9),)),
    "Conv1d-unbatched": Case(lambda: nn.Conv1d(4, 6, 3), ((4, 9),), batch=None),
    "Conv1d-dora": Case(lambda: nn.Conv1d(4, 6, 3, padding=1), ((2, 4, 9),), options={"use_dora": True}),
    "Conv2d": Case(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), ((2, 3, 7, 6),)),
    "Conv2d-1x1": Case(lambda: nn.Conv2d(3, 5, 1, bias=False), ((2, 3, 4, 4),)),
    "Conv2d-same-reflect": Case(
        lambda: nn.Conv2d(3, 5, (3, 4), padding="same", dilation=(1, 2), padding_mode="reflect"),
        ((2, 3, 8, 8),),
    ),
    "Conv2d-replicate": Case(
        lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="replicate"), ((2, 3, 6, 6),)
    ),
    "Conv2d-circular-groups": Case(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), ((2, 4, 6, 6),)
    ),
    "Conv2d-groups": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), ((2, 4, 6, 6),), options={"rank": 3}
    ),
    "Conv2d-groups-dora": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), ((2, 4, 7, 7),), options={"use_dora": True}
    ),
    "Conv2d-groups-rslora": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2), ((2, 4, 6, 6),), options={"use_rslora": True}
    ),
    "Conv2d-depthwise": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), ((2, 6, 5, 5),), options={"rank": 5}
    ),
    "Conv2d-depthwise-twice": Case(
        lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2, padding=1, padding_mode="reflect"), ((2, 3, 6, 6),)
    ),
    "Conv2d-depthwise-dora": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6), ((2, 6, 5, 5),), options={"use_dora": True}
    ),
    "Conv2d-one-channel": Case(lambda: nn.Conv2d(1, 5, 3), ((2, 1, 5, 5),)),
    "Conv2d-unbatched": Case(lambda: nn.Conv2d(4, 6, 3, groups=2), ((4, 6, 6),), batch=None),
    "Conv2d-unbatched-dora": Case(
        lambda: nn.Conv2d(4, 6, 3), ((4, 6, 6),), batch=None, options={"use_dora": True}
    ),
    "Conv3d": Case(lambda: nn.Conv3d(2, 4, (1, 3, 2), stride=(1, 2, 1)), ((2, 2, 3, 6, 5),)),
    "Conv3d-same": Case(
        lambda: nn.Conv3d(2, 4, 3, padding="same", padding_mode="replicate"), ((2, 2, 3, 4, 4),)
    ),
    "Conv3d-groups": Case(
        lambda: nn.Conv3d(4, 6, 2, groups=2, padding=1, padding_mode="circular", bias=False),
        ((2, 4, 3, 4, 3),),
    ),
    "Conv3d-depthwise": Case(lambda: nn.Conv3d(3, 3, 3, groups=3, padding=1), ((2, 3, 3, 4, 3),)),
    "Conv3d-unbatched-dora": Case(
        lambda: nn.Conv3d(2, 4, 2), ((2, 3, 4, 3),), batch=None, options={"use_dora": True}
    ),
}

TRANSPOSED = {
    "ConvTranspose1d": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), ((2, 4, 5),)
    ),
    "ConvTranspose1d-groups": Case(
        lambda: nn.ConvTranspose1d(6, 9, 4, groups=3, dilation=2, bias=False), ((2, 6, 5),)
    ),
    "ConvTranspose1d-unbatched": Case(lambda: nn.ConvTranspose1d(4, 6, 3), ((4, 5),), batch=None),
    "ConvTranspose2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=(1, 0)), ((2, 4, 3, 4),)
    ),
    "ConvTranspose2d-groups": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1),
        ((2, 4, 4, 4),),
        options={"use_rslora": True},
    ),
    "ConvTranspose2d-depthwise": Case(
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), ((2, 4, 3, 3),), options={"rank": 1}
    ),
    "ConvTranspose2d-output-size": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), ((2, 4, 3, 4),), attach_adapter
    ),
    "ConvTranspose2d-unbatched": Case(
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), ((4, 3, 3),), batch=None
    ),
    "ConvTranspose3d": Case(
        lambda: nn.ConvTranspose3d(2, 4, (1, 3, 2), stride=2, output_padding=(0, 1, 1)), ((2, 2, 2, 3, 2),)
    ),
    "ConvTranspose3d-groups": Case(
        lambda: nn.ConvTranspose3d(4, 6, 2, groups=2, dilation=(1, 2, 1)), ((2, 4, 2, 2, 2),)
    ),
}

EMBEDDING = {
    "Embedding": Case(lambda: nn.Embedding(7, 4), indices(2, 5)),
    "Embedding-padding": Case(lambda: nn.Embedding(7, 4, padding_idx=3), indices(2, 5)),
    "Embedding-sparse": Case(lambda: nn.Embedding(7, 4, padding_idx=-1, sparse=True), indices(9)),
    "Embedding-frequency": Case(
        lambda: nn.Embedding(7, 4, padding_idx=0, scale_grad_by_freq=True), indices(3, 5)
    ),
    "EmbeddingBag-mean": Case(lambda: nn.EmbeddingBag(7, 4), indices(3, 5)),
    "EmbeddingBag-sum": Case(lambda: nn.EmbeddingBag(7, 4, mode="sum", padding_idx=2), indices(3, 5)),
    "EmbeddingBag-max": Case(lambda: nn.EmbeddingBag(7, 4, mode="max"), indices(3, 5)),
    "EmbeddingBag-weights": Case(
        lambda: nn.EmbeddingBag(7, 4, mode="sum"), lambda: (*indices(3, 5)(), torch.randn(3, 5)), weigh
    ),
    "EmbeddingBag-offsets": Case(
        lambda: nn.EmbeddingBag(7, 4, include_last_offset=True),
        lambda: (*indices(8)(), torch.tensor([0, 3, 3, 8])),
        batch=None,
    ),
    "EmbeddingBag-sparse": Case(lambda: nn.EmbeddingBag(7, 4, mode="sum", sparse=True), indices(3, 5)),
    "EmbeddingBag-frequency": Case(
        lambda: nn.EmbeddingBag(7, 4, mode="sum", scale_grad_by_freq=True), indices(3, 5)
    ),
}

BOTH = ("layer.in_proj", "layer.out_proj")
ATTENTION = {
    "Attention": Case(lambda: nn.MultiheadAttention(8, 2), ((5, 2, 8),), attend, BOTH, batch=1),
    "Attention-dora": Case(
        lambda: nn.MultiheadAttention(8, 2), ((5, 2, 8),), attend, BOTH, {"use_dora": True}, batch=1
    ),
    "Attention-q-v": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        ((2, 5, 8), (2, 4, 8), (2, 4, 8)),
        attend,
        ("in_proj.q", "in_proj.v"),
    ),
    "Attention-q-v-dora": Case(
        lambda: nn.MultiheadAttention(8, 2),
        ((5, 2, 8),),
        attend,
        ("in_proj.q", "in_proj.v"),
        {"use_dora": True},
        batch=1,
    ),
    "Attention-kdim": Case(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, bias=False),
        ((5, 2, 8), (3, 2, 6), (3, 2, 4)),
        attend,
        batch=1,
    ),
    "Attention-bias-k": Case(
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, dropout=0.2),
        ((5, 2, 8),),
        attend,
        BOTH,
        batch=1,
    ),
    "Attention-masked": Case(lambda: nn.MultiheadAttention(8, 2), ((5, 2, 8),), attend_masked, BOTH, batch=1),
    "Attention-padded": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), ((2, 5, 8),), attend_padded, BOTH
    ),
    "Attention-unbatched": Case(
        lambda: nn.MultiheadAttention(8, 2), ((5, 8),), attend, ("layer",), batch=None
    ),
    "EncoderLayer": Case(
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        ((2, 5, 8),),
        targets=("in_proj", "out_proj", "linear1", "linear2"),
    ),
    "fused-qkv": Case(timm_attention, ((2, 5, 8),), targets=("qkv.q", "qkv.v")),
    "fused-qkv-dora": Case(
        timm_attention, ((2, 5, 8),), targets=("qkv.q", "qkv.v"), options={"use_dora": True}
    ),
}

RECURRENT = {
    "LSTM": Case(lambda: nn.LSTM(5, 6), ((4, 2, 5),), batch=1),
    "LSTM-deep": Case(
        lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True),
        ((2, 4, 5),),
        batch=None,
    ),
    "LSTM-projected": Case(lambda: nn.LSTM(5, 6, proj_size=3, bidirectional=True), ((4, 2, 5),), batch=1),
    "LSTM-packed": Case(lambda: nn.LSTM(5, 6, batch_first=True), ((3, 4, 5),), packed, batch=None),
    "LSTM-state": Case(
        lambda: nn.LSTM(5, 6, bias=False), ((4, 2, 5), (1, 2, 6), (1, 2, 6)), with_state, batch=1
    ),
    "LSTM-gates": Case(
        lambda: nn.LSTM(5, 6), ((4, 2, 5),), targets=("weight_ih_l0.f", "weight_hh_l0.g"), batch=1
    ),
    "LSTM-gates-dora": Case(
        lambda: nn.LSTM(5, 6),
        ((4, 2, 5),),
        targets=("weight_ih_l0.i", "weight_ih_l0.o"),
        options={"use_dora": True},
        batch=1,
    ),
    "LSTM-dora": Case(lambda: nn.LSTM(5, 6), ((4, 2, 5),), options={"use_dora": True}, batch=1),
    "LSTM-unbatched": Case(lambda: nn.LSTM(5, 6), ((4, 5),), batch=None),
    "GRU": Case(lambda: nn.GRU(5, 6, num_layers=2), ((4, 2, 5),), batch=1),
    "GRU-gates": Case(
        lambda: nn.GRU(5, 6), ((4, 2, 5), (1, 2, 6)), with_state, ("weight_hh_l0.n", "weight_ih_l0.z"),
        batch=1,
    ),
    "GRU-packed": Case(lambda: nn.GRU(5, 6, batch_first=True, bidirectional=True), ((3, 4, 5),), packed,
        batch=None),
    "RNN": Case(lambda: nn.RNN(5, 6, bidirectional=True), ((4, 2, 5),), batch=1),
    "RNN-relu": Case(lambda: nn.RNN(5, 6, nonlinearity="relu"), ((4, 2, 5),), batch=1),
    "LSTMCell": Case(lambda: nn.LSTMCell(5, 6), ((2, 5), (2, 6), (2, 6)), with_state),
    "LSTMCell-gates": Case(lambda: nn.LSTMCell(5, 6), ((2, 5),), targets=("weight_ih.f", "weight_ih.o")),
    "GRUCell": Case(lambda: nn.GRUCell(5, 6), ((2, 5),)),
    "RNNCell": Case(lambda: nn.RNNCell(5, 6), ((2, 5), (2, 6)), with_state),
}  # fmt: skip

GENERAL = {
    "Linear": Case(lambda: nn.Linear(6, 5), ((2, 3, 6),)),
    "Linear-dora": Case(lambda: nn.Linear(6, 5), ((2, 3, 6),), options={"use_dora": True}),
    "Conv1D": Case(transformers_conv1d, ((2, 3, 6),)),
    "StdConv2d": Case(lambda: timm_layer("StdConv2d", 3, 6, 3, padding=1), ((2, 3, 6, 6),)),
    "Conv2dSame": Case(lambda: timm_layer("Conv2dSame", 4, 6, 3, stride=2, groups=2), ((2, 4, 7, 7),)),
    "Conv2dSame-dora": Case(
        lambda: timm_layer("Conv2dSame", 4, 6, 3, stride=2), ((2, 4, 7, 7),), options={"use_dora": True}
    ),
    "weight-norm": Case(lambda: parametrizations.weight_norm(nn.Linear(6, 5)), ((2, 6),)),
    "weight-norm-conv": Case(
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2, padding=1), dim=2), ((2, 4, 7),)
    ),
    "weight-norm-dora": Case(
        lambda: parametrizations.weight_norm(nn.Linear(6, 5)), ((2, 6),), options={"use_dora": True}
    ),
    "weight-norm-transposed": Case(
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 4, stride=2)), ((2, 4, 5),)
    ),
    "spectral-norm": Case(lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), ((2, 6),)),
    "spectral-norm-conv": Case(lambda: parametrizations.spectral_norm(nn.Conv2d(3, 5, 3)), ((2, 3, 5, 5),)),
    "weight-norm-LSTM": Case(
        lambda: parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0"), ((4, 2, 5),), batch=1
    ),
    "own-class": Case(Scaled, ((2, 6),)),
    "own-forward": Case(lambda: Cosine(6, 5), ((2, 6),)),
    "own-conv-forward": Case(lambda: Standardized(3, 5, 3), ((2, 3, 5, 5),)),
}

CASES: dict[str, Case] = {**CONV, **TRANSPOSED, **EMBEDDING, **ATTENTION, **RECURRENT, **GENERAL}
