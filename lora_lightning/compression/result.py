"""Compressed: what became of every layer, as data that can be printed, compared and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lightning.planning.plan import summary
from lora_lightning.utils.tables import format_table, percent

FORMAT = 1


@dataclass(frozen=True)
class CompressedLayer:
    """A layer by smaller ones.

    Attributes:
        name: in the model.
        kind: class of the layer that it was.
        shape: of its weight; of an LSTM inputs, hidden units, layers and directions.
        form: one of `forms.FORMS`, such as "svd"; "projected" of an LSTM.
        rank: one number; of "tucker" those of the outputs and of the inputs.
        parameters: of its weights, before and after.
        flops: a batch, before and after; None without data.
        error: ‖(W − Ŵ)X‖ / ‖WX‖ on the data; ‖W − Ŵ‖ / ‖W‖ without them or with `plain`; of an LSTM
            that of the layer that loses most, in what its hidden units are multiplied to.
        readers: of an LSTM, the linear layers that read it, which are narrower.
        milliseconds: in the first batch, before and after; None where time was not asked for.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    form: str
    rank: tuple[int, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None
    error: float
    readers: tuple[str, ...] = ()
    milliseconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Compressed:
    """What was done to a model; `print` it for a table.

    Attributes:
        layers: those that were replaced, in the model's order.
        dense: the other linear layers and convolutions, and why they are as they were.
        parameters: of the whole model, before and after.
        flops: of all linear layers and convolutions, a batch, before and after; None without data.
        batches: that were looked at; 0 without data.
        milliseconds: of all layers that can be compressed, before and after; None where time was not asked
            for.
    """

    layers: tuple[CompressedLayer, ...]
    dense: dict[str, str]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None
    batches: int
    milliseconds: tuple[float, float] | None = None

    def description(self) -> dict[str, Any]:
        """Plain types, fit for JSON, from which `compressed` gives a fresh model the same layers."""
        keys = ("name", "kind", "form")
        return {
            "format": FORMAT,
            "layers": [
                {k: getattr(p, k) for k in keys}
                | {"shape": list(p.shape), "rank": list(p.rank)}
                | ({"readers": list(p.readers)} if p.readers else {})
                for p in self.layers
            ],
        }

    def __str__(self) -> str:
        counted, timed = self.flops is not None, self.milliseconds is not None
        header = [
            "layer",
            "weight",
            "form",
            "rank",
            "parameters",
            "of before",
            *["FLOPs"] * counted,
            *["time"] * timed,
            "error %",
        ]
        rows = []
        for p in self.layers:
            shape, rank = "×".join(map(str, p.shape)), "×".join(map(str, p.rank))
            before, after = p.parameters
            flops = [percent(p.flops[1], p.flops[0]) if p.flops and p.flops[0] else ""] * counted
            size = [f"{after:,}", percent(after, before)]
            times = [percent(p.milliseconds[1], p.milliseconds[0]) if p.milliseconds else ""] * timed
            rows.append([p.name, shape, p.form, rank, *size, *flops, *times, f"{100 * p.error:.2f}"])
        lines = [format_table(header, rows) if rows else "no layer is compressed"]
        if self.dense:
            lines.append(f"left dense: {summary(self.dense)}")
        before, after = self.parameters
        lines.append(f"parameters: {after:,} of {before:,} ({percent(after, before)})")
        if self.flops:
            before, after = self.flops
            lines.append(f"FLOPs a batch: {after:,} of {before:,} ({percent(after, before)})")
        if self.milliseconds:
            slow, fast = self.milliseconds
            lines.append(f"ms of these layers: {fast:.2f} of {slow:.2f} ({percent(fast, slow)})")
        return "\n".join(lines)
