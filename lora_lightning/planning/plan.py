"""Plan: what a configuration means for one model, as data that can be printed, compared and saved."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lora_lightning.layers.layer import slot_key
from lora_lightning.utils.names import family, joined
from lora_lightning.utils.tables import ROOT, format_table, percent, truncate_list


@dataclass(frozen=True)
class LayerPlan:
    """One weight to adapt.

    Attributes:
        name: `blocks.0.attn.qkv`, `lstm.weight_ih_l0`, `self_attn.in_proj.q`.
        module: name of the module that holds it.
        slot: its slot there, "" for a module with one weight.
        kind: class of the module.
        shape: of the weight, or of its rows.
        rank: at most the smaller side of the weight (of one group of it).
        alpha: the update is scaled by alpha / rank, or alpha / √rank with `use_rslora`.
        parameters: that train.
        asked: the rank that was asked for, where the smaller side caps it, else None.
        fixed: rank of the part of the update that never trains.
        mixed: of a mixture the adapters that it is made of, each with its rank here.
        explained: the share of the variance, of the layer's inputs or of the gradient, that its rank
            explains, where data have decided it.
    """

    name: str
    module: str
    slot: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    parameters: int
    asked: int | None = field(default=None, compare=False)
    fixed: int = 0
    mixed: tuple[tuple[str, int], ...] = ()
    explained: float | None = field(default=None, compare=False)

    @property
    def shown_rank(self) -> str:
        """`9`, or `16, capped at 9`."""
        return str(self.rank) if self.asked is None else f"{self.asked}, capped at {self.rank}"

    def tensor(self, part: str) -> str:
        """Name in a file of one of the update's tensors.

        Args:
            part: `lora_A`, `lora_B` or another of its leaves.
        """
        return joined(self.name, part)

    def update(self, adapter: str) -> str:
        """Name of the update in the model, and in a checkpoint's state_dict.

        Args:
            adapter: whose update.
        """
        return joined(self.module, f"lora.{adapter}.{slot_key(self.slot)}")


@dataclass(frozen=True)
class Plan:
    """What a configuration means for a model. Compares equal to a plan of the same decisions.

    Attributes:
        layers: what is adapted.
        heads: modules that train in full (PEFT's `modules_to_save`).
        skipped: layers with a weight that stay frozen, and why.
        backbone: name of the backbone ("" is the whole model); what lies outside is left as it was.
        trainable: parameters that will train, those outside the backbone included.
        total: all parameters, the updates included.
        by_data: what data have decided, and how; "" where they had no say.
    """

    layers: list[LayerPlan]
    heads: list[str]
    skipped: dict[str, str] = field(compare=False)
    backbone: str
    trainable: int = field(compare=False)
    total: int = field(compare=False)
    by_data: str = field(default="", compare=False)

    def families(self) -> list[tuple[str, int, str, str, int]]:
        """Layers that repeat in one row: name with `*` for the numbers of blocks and stages, how many,
        smallest and largest weight, rank, parameters."""
        groups: dict[tuple[str, str], list[LayerPlan]] = {}
        for layer in self.layers:
            name = family(layer.name) or ROOT
            rank = layer.shown_rank if layer.explained is None else ""  # data give each its own
            groups.setdefault((name, rank), []).append(layer)
        return [
            (name, len(group), _shapes(group), rank or _decided(group), sum(p.parameters for p in group))
            for (name, rank), group in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Args:
            values: what that has returned, also by way of JSON.

        Raises:
            TypeError, KeyError, AttributeError: the values are not a plan's.
        """
        layers = [
            LayerPlan(**{**v, "shape": tuple(v["shape"]), "mixed": tuple(map(tuple, v.get("mixed", ())))})
            for v in values["layers"]
        ]
        planned = cls(**{**values, "layers": layers})
        for layer in layers:
            words = (layer.name, layer.module, layer.slot, layer.kind)
            asked = () if layer.asked is None else (layer.asked,)
            numbers = (*layer.shape, layer.rank, layer.parameters, *asked)
            explained = 0.0 if layer.explained is None else layer.explained
            if not (
                all(isinstance(w, str) for w in words)
                and type(explained) in (int, float)
                and 0 <= explained <= 1
                and all(type(n) is int and n > 0 for n in numbers)
                and type(layer.fixed) is int
                and layer.fixed >= 0
                and all(type(n) is str and type(r) is int and r >= 0 for n, r in layer.mixed)
                and (not layer.mixed or (sum(r for _, r in layer.mixed) == layer.rank and not layer.fixed))
                and type(layer.alpha) in (int, float)
                and 0 < layer.alpha <= sys.float_info.max
            ):
                raise TypeError(f"the plan of {layer.name!r} holds a value of another kind")
        texts = (
            planned.backbone,
            planned.by_data,
            *planned.heads,
            *planned.skipped.keys(),
            *planned.skipped.values(),
        )
        if not all(isinstance(t, str) for t in texts) or isinstance(planned.heads, str):
            raise TypeError("its plan holds a value of another kind")
        return planned

    def renamed(self, rename: Callable[[str], str]) -> Plan:
        """The same plan for a model whose modules have other names.

        Args:
            rename: from a name of here to the name there.
        """
        return replace(
            self,
            layers=[replace(p, name=rename(p.name), module=rename(p.module)) for p in self.layers],
            heads=[rename(h) for h in self.heads],
            skipped={rename(n): r for n, r in self.skipped.items()},
            backbone=rename(self.backbone) if self.backbone else "",
        )

    def __str__(self) -> str:
        rows = [(n, c, s, r, f"{p:,}") for n, c, s, r, p in self.families()]
        lines = [format_table(("adapted layers", "count", "weight", "rank", "parameters"), rows)]
        if not self.layers:
            lines = ["no layer is adapted"]
        if self.by_data:
            lines.append(self.by_data)
        if self.heads:
            lines.append(f"trained in full: {', '.join(self.heads)}")
        if self.backbone:
            lines.append(f"outside {self.backbone}: as it was, what trained before still trains")
        if self.skipped:
            lines.append(f"left frozen: {summary(self.skipped)}")
        lines.append(
            f"trainable: {self.trainable:,} of {self.total:,} parameters "
            f"({percent(self.trainable, self.total)})"
        )
        return "\n".join(lines)


def _decided(layers: list[LayerPlan]) -> str:
    """`3 … 16 (61 … 90 %)`: ranks, and the shares of the variance that they explain."""
    shares = [round(100 * p.explained) for p in layers if p.explained is not None]
    return f"{_span([p.rank for p in layers])} ({_span(shares)} %)"


def _span(values: list[int]) -> str:
    return f"{min(values)} … {max(values)}" if min(values) < max(values) else str(values[0])


def _shapes(layers: list[LayerPlan]) -> str:
    shapes = sorted({p.shape for p in layers}, key=math.prod)
    ends = [shapes[0], shapes[-1]] if len(shapes) > 1 else shapes
    return " … ".join("×".join(map(str, s)) for s in ends)


def summary(skipped: Mapping[str, str]) -> str:
    """`conv1 (the stem); layer1.0.conv2 and 3 more (a convolution in 32 groups)`, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{truncate_list(names, most=1)} ({reason})" for reason, names in reasons.items())
