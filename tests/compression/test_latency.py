"""Budgets of time: what is measured, what is refused, and that the model is otherwise as it was."""

import time
from itertools import pairwise

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.compression import gather, latency


class Clock:
    """On which a multiplication of a layer takes a nanosecond, and each call a thousand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(latency, "LEAST", 0.0)
        monkeypatch.setattr(time, "process_time", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for kind in (nn.Linear, nn.LSTM):
            monkeypatch.setattr(kind, "forward", self._ticking(kind.forward))

    def _ticking(self, forward):
        def ticking(module, x, *args):
            rows = x.numel() // x.shape[-1]
            self.now += 1e-6 + 1e-9 * rows * sum(p.numel() for p in module.parameters() if p.dim() > 1)
            return forward(module, x, *args)

        return ticking


def net(*sizes):
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


def test_time_is_that_of_the_first_batch_and_the_budget_is_met(monkeypatch):
    Clock(monkeypatch)
    model, state = net(96, 96, 96, 16), torch.get_rng_state()
    first = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    told = ll.compress(model, latency=0.5, data=[first, first.repeat(9, 1)])
    assert torch.equal(state, torch.get_rng_state())
    before, after = told.milliseconds
    assert before == pytest.approx(1e3 * (3e-6 + 5e-9 * (2 * 96 * 96 + 96 * 16)), rel=1e-3)
    assert after <= 0.5 * before
    for layer in told.layers:
        rank = layer.rank[0]
        assert layer.milliseconds[1] == pytest.approx(1e3 * (2e-6 + 5e-9 * rank * 192), rel=1e-3)
    assert f"ms of these layers: {after:.2f} of {before:.2f}" in str(told)


def test_what_is_slower_is_left_by_name(monkeypatch):
    Clock(monkeypatch)
    model = net(96, 96, 8, 8)  # two calls of a layer of 8 × 8 take longer than one
    told = ll.compress(model, latency=0.7, data=[torch.randn(1, 96)])
    assert [p.name for p in told.layers] == ["0"]
    assert told.dense["4"] == gather.SLOWER
    with pytest.raises(ll.ConfigError, match=r"latency=0.01: the smallest ranks .* give at least 0\.\d"):
        ll.compress(net(96, 96), latency=0.01, data=[torch.randn(1, 96)])
    with pytest.raises(ll.ConfigError, match=r"latency=0.5: give data="):
        ll.compress(net(96, 96), latency=0.5, plain=True)


def test_layers_that_are_alike_are_measured_once(monkeypatch):
    measured = []
    chain = gather.chain
    monkeypatch.setattr(gather, "chain", lambda modules: measured.append(1) or chain(modules))
    Clock(monkeypatch)
    ll.compress(net(256, 256, 256), latency=0.5, data=[torch.randn(1, 256)])
    assert len(measured) == latency.POINTS


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def test_an_lstm_counts_with_what_reads_it(monkeypatch):
    Clock(monkeypatch)
    model = Reader()
    biases = [p.clone() for n, p in model.named_parameters() if "bias" in n]
    told = ll.compress(model, latency=0.7, data=[torch.randn(2, 6, 8)])
    (layer,) = told.layers
    before = 2e-6 + 12e-9 * (192 * 56 + 192)
    rank = layer.rank[0]
    after = 2e-6 + 12e-9 * (192 * (8 + rank) + 48 * rank + 4 * rank)
    assert layer.milliseconds == pytest.approx((1e3 * before, 1e3 * after), rel=1e-3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(biases, (p for n, p in model.named_parameters() if "bias" in n), strict=True)
    )


def test_really_measured():
    told = ll.compress(net(512, 512, 512), latency=0.6, data=[torch.randn(8, 512)])
    assert told.layers and told.milliseconds[1] <= 0.6 * told.milliseconds[0]
    assert all(p.milliseconds[1] < p.milliseconds[0] for p in told.layers)
