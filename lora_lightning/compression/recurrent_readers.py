"""Which LSTMs of a model can have a projection, and which linear layers read their outputs: found by turning
the outputs and looking whether these layers alone notice."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from lora_lightning.adapters.measure import run
from lora_lightning.adapters.unharmed import unharmed
from lora_lightning.compression.recurrent import Stack
from lora_lightning.layers.registry import DTYPES
from lora_lightning.layers.swap import class_of
from lora_lightning.utils.names import named_modules, named_parameters

NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a norm; of other types FAR
FAR = 0.05
TRIAL = 4  # the rank of a trial
READ = "something else than a linear layer reads its outputs, which would be narrower"
STATES = "its caller counts on the size of its states, which would be smaller"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def lstms_of(model: nn.Module, excluded: set[str]) -> tuple[dict[str, nn.LSTM], dict[str, str]]:
    """The LSTMs that can have a projection if linear layers read them, by name, and why the other recurrent
    layers stay as they are."""
    holders: dict[int, set[nn.Module]] = {}
    modules = named_modules(model, all_names=True)
    for name, parameter in named_parameters(model, all_names=True).items():
        holders.setdefault(id(parameter), set()).add(modules[name.rpartition(".")[0]])
    found, left = {}, {}
    for name, module in named_modules(model).items():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            tied = any(len(holders.get(id(p), ())) > 1 for p in module._parameters.values())
            reason = "excluded" if name in excluded else _reason(name, module)
            if reason or tied:
                left[name] = reason or "shares its weights"
            else:
                found[name] = cast(nn.LSTM, module)
    return found, left


def _reason(name: str, module: nn.Module) -> str | None:
    """Why a recurrent layer stays as it is, or None."""
    kind = type(module).__name__
    if not isinstance(module, nn.LSTM):
        return f"nn.{kind} has no projection in torch"
    if not name:
        return "it is the model itself: put it into a module that reads it"
    if module.proj_size:
        return "it has a projection already"
    if class_of(module).forward is not nn.LSTM.forward or class_of(module) is not nn.LSTM:
        return f"{kind} is a class of its own"
    if is_parametrized(module) or len(module._parameters) != len(module._flat_weights_names):
        return "its weights are computed by a parametrization or a hook"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks, which would be lost"
    if any(p is None or p.dtype not in DTYPES for p in module._parameters.values()):
        return "its weights are quantized"
    return "it has one hidden unit" if module.hidden_size < 2 else None


def readers_of(
    model: nn.Module, name: str, lstm: nn.LSTM, linears: Mapping[str, nn.Linear], batch: Any
) -> dict[str, nn.Linear] | str:
    """The linear layers that read an LSTM's outputs and nothing else, or why it has to stay as it is.

    The outputs and the hidden state that it gives are turned by a random rotation, and back where they reach
    such a layer or the LSTM again; the model's outputs are then the same if nothing else reads them. A state
    may be among the model's outputs. Then the narrower layers are tried.

    Args:
        linears: that may be changed, by name.
        batch: the model is run with it; it is, bit for bit, as it was.
    """
    width = lstm.hidden_size * (1 + lstm.bidirectional)
    fitting = {n: m for n, m in linears.items() if m.in_features == width}
    turn = Turn(lstm, fitting)
    with unharmed(model), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.training = False  # no dropout between layers
        before = _leaves(model, batch, turn.hooks(turned=False))
        try:
            after = _leaves(model, batch, turn.hooks(turned=True))
        except Exception:  # whatever the model's own code makes of other values
            return READ
        if not turn.calls:
            return "no batch reaches it"
        if not turn.readers() or not _alike(before, after, turn.states):
            return READ
        stack = Stack(lstm, turn.readers())
        for place, narrow in stack.empty(min(TRIAL, lstm.hidden_size - 1)).items():
            _try(model, stack.readers.get(place, lstm), narrow)
        try:
            tried = _leaves(model, batch, [])
        except Exception:
            return STATES
    same = [
        a.shape == b.shape for a, b, c in zip(before, tried, after, strict=True) if id(c) not in turn.states
    ]
    return stack.readers if all(same) else READ


class Turn:
    """An LSTM whose outputs are turned while its model runs."""

    def __init__(self, lstm: nn.LSTM, linears: Mapping[str, nn.Linear]) -> None:
        self.lstm, self.linears, self.calls = lstm, dict(linears), 0
        weight = lstm.weight_hh_l0
        numbers = torch.Generator().manual_seed(0)
        ways = 1 + lstm.bidirectional
        drawn = torch.randn(ways, lstm.hidden_size, lstm.hidden_size, generator=numbers, dtype=torch.float64)
        self.each = torch.linalg.qr(drawn).Q.to(weight)  # (ways, hidden, hidden)
        self.whole = torch.block_diag(*self.each)
        self.seen: dict[str, list[Tensor]] = {n: [] for n in linears}
        self.found: dict[str, list[bool]] = {n: [] for n in linears}
        self.states: dict[int, Tensor] = {}

    def readers(self) -> dict[str, nn.Linear]:
        """Those whose every input was turned."""
        return {n: m for n, m in self.linears.items() if self.found[n] and all(self.found[n])}

    def hooks(self, turned: bool) -> list[Any]:
        """Hooks that take note of inputs, or that turn; each has to be removed."""
        if not turned:
            return [m.register_forward_pre_hook(partial(self._note, n)) for n, m in self.linears.items()]
        hooks: list[Any] = [
            self.lstm.register_forward_pre_hook(self._back, with_kwargs=True),
            self.lstm.register_forward_hook(self._turn),
        ]
        return hooks + [m.register_forward_pre_hook(partial(self._read, n)) for n, m in self.linears.items()]

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen[name].extend(x.clone() for x in args[:1])

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        number = len(self.found[name])
        earlier = self.seen[name][number : number + 1]
        turned = bool(earlier and args) and _near(args[0], earlier[0] @ self.whole)
        self.found[name].append(turned)
        return (args[0] @ self.whole.mT,) if turned else None

    def _back(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        if state is None:
            return None
        given = args[0] if args else kwargs["input"]
        return (given,), {"hx": (self._state(state[0], back=True), state[1])}

    def _turn(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.calls += 1
        out, (hidden, cell) = output
        hidden = self._state(hidden)
        self.states |= {id(hidden): hidden, id(cell): cell}
        if isinstance(out, PackedSequence):
            return out._replace(data=out.data @ self.whole), (hidden, cell)
        return out @ self.whole, (hidden, cell)

    def _state(self, hidden: Tensor, back: bool = False) -> Tensor:
        turns = self.each.mT if back else self.each
        return torch.stack([one @ turns[i % len(turns)] for i, one in enumerate(hidden)])


def _leaves(model: nn.Module, batch: Any, hooks: list[Any]) -> list[Any]:
    """What the model gives for a batch, with hooks that are then removed."""
    torch.manual_seed(0)  # what is drawn is drawn alike
    try:
        return [leaf for leaf in tree_leaves(run(model, batch)) if isinstance(leaf, Tensor)]
    finally:
        for hook in hooks:
            hook.remove()


def _alike(before: list[Tensor], after: list[Tensor], states: Mapping[int, Tensor]) -> bool:
    """Whether outputs are the same, but for states of the LSTM."""
    if len(before) != len(after):
        return False
    return all(id(b) in states or _near(b, a) for a, b in zip(before, after, strict=True))


def _near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    x, y, near = x.double(), y.double(), NEAR.get(x.dtype, FAR)
    return bool(torch.linalg.vector_norm(x - y) <= near * torch.linalg.vector_norm(y))


def _try(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place; `unharmed` puts that back. Its values are zeros."""
    for parameter in new.parameters():
        if not any(parameter is p for p in old.parameters()):
            parameter.zero_()
    for holder in list(model.modules()):
        for leaf, child in holder._modules.items():
            if child is old:
                holder._modules[leaf] = new
