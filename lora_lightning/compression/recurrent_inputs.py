"""What data show of LSTMs: the second moments of their hidden units, and how much their outputs depend on
each gate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layer_inputs import Draw, one_layer, padded, state_of, turned
from lora_lightning.adapters.measure import run
from lora_lightning.adapters.unharmed import unharmed
from lora_lightning.compression.moment import LEADING, WHOLE, Moment
from lora_lightning.compression.recurrent import Shown
from lora_lightning.errors import UserError
from lora_lightning.methods.moments import Moments
from lora_lightning.utils.progress import working

STEPS = 4096  # of all sequences, after which no more gradients are looked at
SEQUENCES = 16  # of a batch, the most whose gradients are looked at


class Watched:
    """An LSTM while its model runs; with `plain` its steps are counted alone.

    Gates are seen by zeros that are added to them: the gradient of the outputs, with random signs, for these
    is what a gate does to all later outputs; the mean of its square is the diagonal of Gauss and Newton's
    matrix (Martens and Grosse 2015, arXiv 1503.05671, take the whole of it).
    """

    def __init__(self, module: nn.LSTM, plain: bool) -> None:
        self.module, self.plain, self.rows, self.sensed = module, plain, 0, 0
        self.draw, self.signs = Draw(), torch.Generator().manual_seed(0)
        self.moments: dict[str, Moments] = {}
        self.squares: dict[str, Tensor] = {}

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call with these arguments."""
        given, state = (*args, kwargs.get("hx"))[:2] if args else (kwargs["input"], kwargs.get("hx"))
        x, lengths = padded(self.module, given)
        inside = torch.arange(len(x), device=x.device)[:, None] < lengths.to(x.device)  # (time, batch)
        self.rows += int(inside.sum())
        if self.plain:
            return
        few = min(SEQUENCES, x.shape[1]) if self.sensed < STEPS else 0
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().clone().to(cast(Tensor, self.module.weight_hh_l0).dtype)
            added, out = self._layers(x, lengths, state, few)
            if few:
                self._sense(added, out, inside[:, :few])

    def shown(self) -> Shown:
        """What was seen."""
        moments = {ending: Moment(one) for ending, one in self.moments.items()}
        return Shown(self.rows, moments, {e: (s / self.sensed).sqrt() for e, s in self.squares.items()})

    def _layers(self, x: Tensor, lengths: Tensor, state: Any, few: int) -> tuple[dict[str, Tensor], Tensor]:
        """Run the layers one by one, without dropout: the zeros by ending (time, few, 4 * hidden), and the
        outputs of these sequences (time, few, ways * hidden)."""
        module, ways = self.module, 1 + self.module.bidirectional
        added: dict[str, Tensor] = {}
        inside = torch.arange(len(x), device=x.device)[:, None] < lengths.to(x.device)
        for layer in range(module.num_layers):
            outputs = []
            for way in range(ways):
                ending, number = (
                    f"l{layer}" + ("_reverse" if way else ""),
                    layer * (1 + module.bidirectional) + way,
                )
                z = turned(x, lengths) if way else x
                initial = None if state is None else state_of(state, number)
                out = torch.empty(len(x), 0, module.hidden_size, device=x.device, dtype=x.dtype)
                if few:
                    zeros = z.new_zeros(len(z), few, 4 * module.hidden_size).requires_grad_()
                    added[ending] = zeros
                    first = None if initial is None else tuple(s[:, :few].contiguous() for s in initial)
                    one = _open(one_layer(module, ending, z.shape[-1]))
                    out = one(torch.cat([z[:, :few], zeros], -1), first)[0]
                if few < x.shape[1]:
                    rest = None if initial is None else tuple(s[:, few:].contiguous() for s in initial)
                    with torch.no_grad():
                        more = one_layer(module, ending, z.shape[-1])(z[:, few:].contiguous(), rest)[0]
                    out = torch.cat([out, more], 1)
                self._add(ending, out.detach()[inside])
                outputs.append(turned(out, lengths) if way else out)
            x = torch.cat(outputs, -1)
        return added, x[:, :few]

    def _add(self, ending: str, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise UserError("data: the hidden units of an LSTM hold NaN or infinity: give others.")
        found = self.moments.get(ending)
        if found is None:
            size = self.module.hidden_size
            found = self.moments[ending] = Moments(size, rank=size if size <= WHOLE else LEADING)
        found.add(self.draw.of(rows).unsqueeze(0))

    def _sense(self, added: Mapping[str, Tensor], out: Tensor, inside: Tensor) -> None:
        drawn = torch.randint(0, 2, out.shape, generator=self.signs) * 2 - 1
        signed = (out * drawn.to(out) * inside[..., None]).sum()
        for ending, found in zip(added, torch.autograd.grad(signed, list(added.values())), strict=True):
            squares = found[inside].double().square().sum(0)  # turned or not, its steps are the first ones
            self.squares[ending] = self.squares.get(ending, torch.zeros_like(squares)) + squares
        self.sensed += int(inside.sum())


def _open(one: nn.RNNBase) -> nn.RNNBase:
    """A layer that adds the last 4 * hidden of its inputs to its gates."""
    weight: Any = one.weight_ih_l0
    gates = torch.eye(len(weight), device=weight.device, dtype=weight.dtype)
    one.input_size += len(weight)
    one.weight_ih_l0 = nn.Parameter(torch.cat([weight, gates], 1), False)
    return one


def watch(
    model: nn.Module, lstms: Mapping[str, nn.LSTM], data: Iterable[Any], plain: bool
) -> dict[str, Shown]:
    """Run a model over batches; it is, bit for bit, as it was. Of each LSTM that was called what was seen.

    Args:
        plain: steps are counted, and nothing else is looked at.

    Raises:
        UserError: hidden units are not finite.
    """
    watched = {name: Watched(module, plain) for name, module in lstms.items()}

    def called(one: Watched, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        one.see(args, kwargs)

    with unharmed(model):
        hooks = [
            w.module.register_forward_hook(partial(called, w), with_kwargs=True) for w in watched.values()
        ]
        try:
            for batch in working(data, "measuring hidden units", "batches"):
                with torch.no_grad():
                    run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: one.shown() for name, one in watched.items() if one.rows}
