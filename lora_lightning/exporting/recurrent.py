"""Recurrent layers as ONNX nodes with any number of frames: LSTM, GRU and RNN, with state in and out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.utils.names import named_modules

# ONNX's order of the gates in the rows of a weight, by torch's: LSTM ifgo -> iofg, GRU rzn -> zrn.
GATES: dict[type[nn.RNNBase], tuple[int, ...]] = {nn.LSTM: (0, 3, 1, 2), nn.GRU: (1, 0, 2), nn.RNN: (0,)}
_PARTS = (("weight_ih",), ("weight_hh",), ("bias_ih", "bias_hh"))  # of the node's W, R and B
_NAME = "_onnx_name"  # attribute: the module's name in the model, for messages


@contextmanager
def recurrent_nodes(model: nn.Module, computed: Collection[str] = ()) -> Iterator[None]:
    """Within this context a trace of the model has one ONNX node for each layer of its recurrent modules, for
    any number of frames; torch's own translation keeps that of the example. A projection (`proj_size`), which
    ONNX's LSTM does not have, becomes a loop over the frames.

    Args:
        model: whose modules are plain torch's; a class with a forward of its own is left alone.
        computed: names of modules whose weights are given in each call; those of the others become constants
            in ONNX's order.
    """
    swapped: list[tuple[Any, type[nn.RNNBase], list[str]]] = []
    try:
        for name, module in named_modules(model).items():
            if type(module) in GATES:
                base = cast("type[nn.RNNBase]", type(module))
                packed = {} if name in computed or module.proj_size else _packed(cast(nn.RNNBase, module))
                swapped.append((module, base, list(packed)))
                for leaf, tensor in packed.items():
                    module.register_buffer(leaf, tensor, persistent=False)
                module.__dict__[_NAME] = name
                module.__class__ = _CLASSES[base]
        yield
    finally:
        for module, base, leaves in swapped:
            module.__class__ = base
            module.__dict__.pop(_NAME, None)
            for leaf in leaves:
                del module._buffers[leaf]


def _forward(self: Any, input: Any, hx: Any = None) -> Any:
    """As of every recurrent module, for tracing alone: a node has no values."""
    if not isinstance(input, Tensor):
        raise UserError(
            f"{getattr(self, _NAME)}: gets a packed sequence, which ONNX does not have: let forward give the "
            "layer the padded batch."
        )
    states = () if hx is None else tuple(hx) if isinstance(hx, tuple) else (hx,)
    batch_dim = 0 if self.batch_first else 1
    alone = input.dim() == 2  # one sequence without a batch
    if alone:
        input, states = input.unsqueeze(batch_dim), tuple(s.unsqueeze(1) for s in states)
    x = input.transpose(0, 1) if self.batch_first else input  # (frames, batch, in)
    last: list[tuple[Tensor, ...]] = []
    directions = 2 if self.bidirectional else 1
    layer_of = _projected if self.proj_size else _nodes
    for layer in range(self.num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        x, ends = layer_of(self, layer, x, [s[rows] for s in states])
        last.append(ends)
    ends = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
    x = x.transpose(0, 1) if self.batch_first else x
    if alone:
        x, ends = x.squeeze(batch_dim), tuple(e.squeeze(1) for e in ends)
    return x, ends if isinstance(self, nn.LSTM) else ends[0]


_CLASSES: dict[type[nn.RNNBase], Any] = {
    base: type(f"Nodes{base.__name__}", (base,), {"forward": _forward}) for base in GATES
}


def _nodes(
    module: nn.RNNBase, layer: int, x: Tensor, states: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer as one node: (frames, batch, in) -> (frames, batch, directions * hidden), and the states
    behind it, each (directions, batch, hidden)."""
    kind = next(base for base in GATES if isinstance(module, base))
    weights, recurrent, bias = (
        module._buffers[leaf] if leaf in module._buffers else _stacked(module, kind, layer, names)
        for leaf, names in zip(_leaves(layer), _PARTS, strict=True)
    )
    hidden, directions = module.hidden_size, 2 if module.bidirectional else 1
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if kind is nn.GRU:
        attributes["linear_before_reset"] = 1
    if kind is nn.RNN:
        attributes["activations"] = [str(module.nonlinearity).capitalize()] * directions
    frames, batch = x.shape[:2]
    ends = 2 if kind is nn.LSTM else 1
    y, *last = torch.onnx.ops.symbolic_multi_out(
        kind.__name__,
        (x, weights, recurrent, bias, None, *(states or (None,) * ends)),
        attributes,
        dtypes=[x.dtype] * (1 + ends),
        shapes=[(frames, directions, batch, hidden), *[(directions, batch, hidden)] * ends],
    )
    return y.transpose(1, 2).flatten(2), tuple(last)


def _packed(module: nn.RNNBase) -> dict[str, Tensor]:
    """What the nodes take, by the names of buffers."""
    kind = next(base for base in GATES if isinstance(module, base))
    with torch.no_grad():
        packed = {
            leaf: _stacked(module, kind, layer, names)
            for layer in range(module.num_layers)
            for leaf, names in zip(_leaves(layer), _PARTS, strict=True)
        }
    return {leaf: tensor.detach() for leaf, tensor in packed.items() if tensor is not None}


def _leaves(layer: int) -> list[str]:
    return [f"onnx_{part}_l{layer}" for part in ("W", "R", "B")]


def _stacked(module: nn.RNNBase, kind: type[nn.RNNBase], layer: int, names: tuple[str, ...]) -> Tensor | None:
    """The weights or biases of one layer, (directions, rows, …), with their gates in ONNX's order."""
    if not module.bias and names[0].startswith("bias"):
        return None
    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]
    size = module.hidden_size
    return torch.stack([
        torch.cat([
            getattr(module, f"{name}{suffix}")[i * size : (i + 1) * size]
            for name in names
            for i in GATES[kind]
        ])
        for suffix in suffixes
    ])  # fmt: skip


def _projected(
    module: nn.RNNBase, layer: int, x: Tensor, states: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer of an LSTM with projections as a loop: (frames, batch, in) -> (frames, batch, directions *
    proj_size), and the last h (directions, batch, proj_size) and c (directions, batch, hidden)."""
    from torch._higher_order_ops.scan import scan

    outputs, hs, cs = [], [], []
    for direction, suffix in enumerate(
        [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]
    ):
        recurrent, project = (getattr(module, f"{w}{suffix}") for w in ("weight_hh", "weight_hr"))
        gates = x @ getattr(module, f"weight_ih{suffix}").T
        if module.bias:
            gates = gates + getattr(module, f"bias_ih{suffix}") + getattr(module, f"bias_hh{suffix}")

        def step(state: Any, gate: Tensor, recurrent: Tensor = recurrent, project: Tensor = project) -> Any:
            h, c = state
            i, f, g, o = (gate + h @ recurrent.T).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = (o.sigmoid() * c.tanh()) @ project.T
            return (h, c), h.clone()

        if states:
            first = states[0][direction], states[1][direction]
        else:
            first = x.new_zeros(x.shape[1], module.proj_size), x.new_zeros(x.shape[1], module.hidden_size)
        (h, c), y = scan(step, first, gates.flip(0) if direction else gates)
        outputs.append(y.flip(0) if direction else y)
        hs.append(h)
        cs.append(c)
    return torch.cat(outputs, 2), (torch.stack(hs), torch.stack(cs))
