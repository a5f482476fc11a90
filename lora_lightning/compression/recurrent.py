"""Stack: an LSTM with a projection in every layer, and the linear layers that read it, as one thing to be
compressed.

The recurrent matrix of a layer and all that reads the same hidden units are factored jointly, with one shared
projection (Prabhavalkar et al. 2016, arXiv 1603.08042): [W_hh; W_next]·h ≈ [U_hh; U_next]·(P·h). torch has
that as `nn.LSTM(proj_size=r)`; its GRU has no projection. Rows weigh by how much the outputs depend on them
where there are data: an error of a gate goes through all later steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.compression.moment import Moment
from lora_lightning.compression.product import balanced, leading, shares

FORM = "projected"
Block = tuple[tuple[str, str], Tensor, Tensor | None]
LEAST = 1e-2  # of the mean, of how much a row weighs


@dataclass
class Shown:
    """What data show of an LSTM.

    Attributes:
        rows: steps in all sequences of all batches.
        moments: of the hidden units, by the ending of the names of its weights, such as "l0_reverse".
        gates: how much the outputs depend on each gate, (4 * hidden,), by the same endings.
    """

    rows: int = 0
    moments: dict[str, Moment] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Units:
    """The hidden units of one layer and direction: what reads them, factored.

    Attributes:
        left: (rows of all readers, k), the recurrent matrix's first.
        right: (k, hidden).
        lost: the share that is lost of what they are multiplied to, by rank.
    """

    left: Tensor
    right: Tensor
    lost: list[float]


class Stack:
    """An LSTM that can have a projection, with its readers.

    Args:
        module: the LSTM.
        readers: linear layers that read its outputs and that nothing else feeds, by name.
        shown: by data; None where the weights alone count.
    """

    def __init__(self, module: nn.LSTM, readers: Mapping[str, nn.Linear], shown: Shown | None = None) -> None:
        self.module, self.readers, self.shown = module, dict(readers), shown or Shown()
        self.hidden, self.ways = module.hidden_size, 1 + module.bidirectional
        self._units: dict[tuple[int, int], Units] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Inputs, hidden units, layers, directions."""
        return self.module.input_size, self.hidden, self.module.num_layers, self.ways

    def sizes(self, rank: int | None) -> tuple[int, dict[str, int]]:
        """Entries of the weights of the LSTM and of its readers; of rank None as they are."""
        width = self.hidden if rank is None else rank
        one = 4 * self.hidden * width + (0 if rank is None else rank * self.hidden)
        inputs = self.module.input_size + (self.module.num_layers - 1) * self.ways * width
        size = self.ways * (self.module.num_layers * one + 4 * self.hidden * inputs)
        return size, {n: m.out_features * self.ways * width for n, m in self.readers.items()}

    def parameters(self, rank: int | None) -> int:
        """Of all of them."""
        own, readers = self.sizes(rank)
        return own + sum(readers.values())

    def flops(self, rank: int | None, places: Mapping[str, int]) -> int:
        """Of all batches, a multiplication and an addition each.

        Args:
            places: where the readers were used, by name.
        """
        own, readers = self.sizes(rank)
        return 2 * own * self.shown.rows + sum(2 * size * places[n] for n, size in readers.items())

    def lost(self, rank: int) -> float:
        """The share that the layer that loses most loses."""
        return max(units.lost[rank] for units in self._factored().values())

    def empty(self, rank: int) -> dict[str, nn.Module]:
        """What takes the places of the LSTM, under "", and of its readers, by name: without values, but for
        biases, which are the same."""
        return {"": self._lstm(rank)} | {n: self._reader(m, rank) for n, m in self.readers.items()}

    @torch.no_grad()
    def modules(self, rank: int) -> dict[str, nn.Module]:
        """The same, with values."""
        new = self.empty(rank)
        lstm = cast(nn.LSTM, new[""])
        read: dict[tuple[str, str], list[Tensor]] = {}
        for (layer, way), units in self._factored().items():
            right, left = balanced(units.right[:rank], units.left[:, :rank])
            getattr(lstm, f"weight_hr_{_ending(layer, way)}").copy_(right)
            start = 0
            for name, rows, _ in self._blocks(layer, way):
                read.setdefault(name, []).append(left[start : start + len(rows)])
                start += len(rows)
        for (module, leaf), parts in read.items():
            getattr(new[module], leaf).copy_(torch.cat(parts, 1))
        for way in range(self.ways):
            first = f"weight_ih_{_ending(0, way)}"
            getattr(lstm, first).copy_(getattr(self.module, first))
        return new

    def _factored(self) -> dict[tuple[int, int], Units]:
        if self._units is None:
            self._units = {
                (layer, way): self._solve(layer, way)
                for layer in range(self.module.num_layers)
                for way in range(self.ways)
            }
        return self._units

    def _solve(self, layer: int, way: int) -> Units:
        moment = self.shown.moments.get(_ending(layer, way), Moment())
        rows: list[Tensor] = []
        weights: list[Tensor] = []
        for _, block, weight in self._blocks(layer, way):
            if weight is None:  # a reader counts as much as the recurrent matrix does
                energy = _energy(rows[0] * weights[0], moment)
                weight = (energy / _energy(block, moment).clamp_min(1e-300)).sqrt().expand(len(block), 1)
            rows.append(block)
            weights.append(weight)
        scale = torch.cat(weights)
        matrix = torch.cat(rows) * scale
        left, energies = leading(matrix, moment)
        return Units(left / scale, left.mT @ matrix, shares(energies))

    def _blocks(self, layer: int, way: int) -> list[Block]:
        """Of what reads the hidden units of a layer and direction: the names of module and weight, the
        columns that do (rows, hidden), and how much each row weighs (rows, 1), None of a reader."""
        ending, columns = _ending(layer, way), slice(way * self.hidden, (way + 1) * self.hidden)
        name = f"weight_hh_{ending}"
        found: list[Block] = [(("", name), self._weight(name), self._gates(ending))]
        if layer + 1 == self.module.num_layers:
            for name, module in self.readers.items():
                found.append(((name, "weight"), module.weight.detach().double()[:, columns], None))
            return found
        for ending in (_ending(layer + 1, other) for other in range(self.ways)):
            name = f"weight_ih_{ending}"
            found.append((("", name), self._weight(name)[:, columns], self._gates(ending)))
        return found

    def _weight(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self.module, name)).detach().double()

    def _gates(self, ending: str) -> Tensor:
        """How much each gate weighs, (4 * hidden, 1)."""
        seen = self.shown.gates.get(ending)
        if seen is None:
            return self._weight(f"weight_hh_{ending}").new_ones(4 * self.hidden, 1)
        found = seen.double()
        return found.clamp_min(LEAST * found.mean().clamp_min(1e-300))[:, None]

    def _lstm(self, rank: int) -> nn.LSTM:
        old, like = self.module, cast(Tensor, self.module.weight_hh_l0)
        new = nn.LSTM(
            old.input_size, old.hidden_size, old.num_layers, bias=old.bias, proj_size=rank,
            batch_first=old.batch_first, dropout=old.dropout, bidirectional=old.bidirectional,
            device="meta", dtype=like.dtype,
        ).to_empty(device=like.device)  # fmt: skip
        for name, parameter in list(new.named_parameters()):
            if name.startswith("bias"):
                setattr(new, name, getattr(old, name))
            else:
                parameter.requires_grad_(getattr(old, name.replace("weight_hr", "weight_hh")).requires_grad)
        return new.train(old.training)

    def _reader(self, old: nn.Linear, rank: int) -> nn.Linear:
        made = {"device": old.weight.device, "dtype": old.weight.dtype}
        new = nn.utils.skip_init(
            nn.Linear, self.ways * rank, old.out_features, bias=old.bias is not None, **made
        )
        new.weight.requires_grad_(old.weight.requires_grad)
        if old.bias is not None:
            new.bias = old.bias
        return new.train(old.training)


def _ending(layer: int, way: int) -> str:
    """Of the names of the weights of a layer and direction."""
    return f"l{layer}" + ("_reverse" if way else "")


def _energy(rows: Tensor, moment: Moment) -> Tensor:
    return (moment.times(rows) * rows).sum()
