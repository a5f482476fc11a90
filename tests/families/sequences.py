"""Cases of embeddings, attention and recurrent layers."""

import torch
from torch import nn

from .case import Case, attend, attend_masked, attend_padded, indices, packed, weigh, with_state


def timm_attention() -> nn.Module:
    from timm.layers import Attention

    return Attention(8, num_heads=2, qkv_bias=True)


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
