"""What a thread can do with a model of several adapters, and a model of speech; for the tests of threads."""

import contextlib

import torch
from mixed import SAMPLES
from torch import nn

import lora_lightning as ll


class Speech(nn.Module):
    """A convolution, a recurrent layer, and a head that the adapters train in full."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(6, 8, 3, padding=1)
        self.layers = nn.ModuleList([nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.front(x.mT).mT
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


def speech() -> nn.Module:
    return Speech()


WAYS = {  # what a thread does, by the adapter that each row of its outputs has
    "off": (lambda model: ll.adapters_off(model), [None] * 6),
    "samples": (lambda model: ll.mixed_adapters(model, SAMPLES), SAMPLES),
    "others": (lambda model: ll.mixed_adapters(model, SAMPLES[::-1]), SAMPLES[::-1]),
    "one alike": (lambda model: ll.mixed_adapters(model, ["two"] * 6), ["two"] * 6),
    "nested": (lambda model: nested(model), ["three"] * 6),
    "select": (lambda model: selected(model, "two"), ["two"] * 6),
    "another": (lambda model: selected(model, "three"), ["three"] * 6),
    "plain": (lambda model: contextlib.nullcontext(), ["one"] * 6),
}


@contextlib.contextmanager
def nested(model):
    with ll.mixed_adapters(model, SAMPLES), ll.adapters_off(model), ll.mixed_adapters(model, ["three"] * 6):
        yield


@contextlib.contextmanager
def selected(model, name):
    ll.set_adapter(model, name)
    yield


def wanted(model, x):
    """The output of each row with each adapter, by itself and in one thread."""
    outputs = {None: None, "one": None, "two": None, "three": None}
    for name in outputs:
        if name is None:
            with ll.adapters_off(model):
                outputs[name] = model(x)
        else:
            ll.set_adapter(model, name)
            outputs[name] = model(x)
    ll.set_adapter(model, "one")
    return {way: torch.stack([outputs[n][i] for i, n in enumerate(rows)]) for way, (_, rows) in WAYS.items()}
