"""What a classifier's outputs tell of each picture: classes with their probabilities, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.tasks.predictions import numbers, probabilities

TOP, THRESHOLD = 5, 0.5
Caption = tuple[str, str]  # what is predicted, how sure


class OneClass:
    """The classes of a picture by their probabilities, the likeliest first."""

    def __init__(self, names: Sequence[str], temperature: float, top: int) -> None:
        self.names, self.temperature = names, temperature
        self.top = min(top, len(names))
        self.columns = ["label", "probability"]
        self.columns += [f"{c}_{n}" for n in range(2, self.top + 1) for c in ("label", "probability")]

    def rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Of a batch's logits (n, classes)."""
        ranked = probabilities(outputs, "class", self.temperature).sort(descending=True, stable=True)
        best = (ranked.indices[:, : self.top].tolist(), ranked.values[:, : self.top].tolist())
        return [
            dict(
                zip(
                    self.columns,
                    [v for i, p in zip(at, ps, strict=True) for v in (self.names[i], p)],
                    strict=True,
                )
            )
            for at, ps in zip(*best, strict=True)
        ]

    def caption(self, row: Mapping[str, Any]) -> Caption:
        return str(row["label"]), f"{row['probability']:.2f}"

    def counted(self, row: Mapping[str, Any]) -> list[str]:
        return [row["label"]]


class ManyClasses:
    """The classes of a picture that are likelier than a threshold, the likeliest first."""

    columns = ("labels", "probabilities")

    def __init__(self, names: Sequence[str], temperature: float, threshold: float) -> None:
        self.names, self.temperature, self.threshold = names, temperature, threshold

    def rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Of a batch's logits (n, classes)."""
        found = []
        for row in probabilities(outputs, "classes", self.temperature):
            order = [i for i in row.argsort(descending=True).tolist() if row[i] >= self.threshold]
            found.append({"labels": [self.names[i] for i in order], "probabilities": row[order].tolist()})
        return found

    def caption(self, row: Mapping[str, Any]) -> Caption:
        pairs = zip(row["labels"], row["probabilities"], strict=True)
        return ", ".join(f"{name} {p:.2f}" for name, p in pairs) or "none", ""

    def counted(self, row: Mapping[str, Any]) -> list[str]:
        return list(row["labels"]) or ["none"]


class ANumber:
    """A number for each picture, in the units of the training data."""

    columns = ("value",)

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Of a batch's outputs (n, 1)."""
        return [{"value": value} for value in numbers(outputs, self.mean, self.std)[:, 0].tolist()]

    def caption(self, row: Mapping[str, Any]) -> Caption:
        return f"{row['value']:.4g}", ""

    def counted(self, row: Mapping[str, Any]) -> list[str]:
        return []


Teller = OneClass | ManyClasses | ANumber


def names_of(facts: Mapping[str, Any]) -> list[str]:
    """Of the classes.

    Raises:
        UserError: the data, which name them, are not known.
    """
    count = facts.get("num_classes") or len(facts.get("class_names", ()))
    names = facts.get("class_names") or [str(number) for number in range(count)]
    if not names:
        raise UserError("its data, which name the classes, are not on this machine: give recipe=NAME.")
    if len(names) != count:
        raise UserError(
            f"class_names: {len(names)} names for num_classes={count}: the file is damaged. Copy it anew."
        )
    return list(names)


def teller_of(facts: Mapping[str, Any], options: Mapping[str, Any]) -> Teller:
    """What makes rows of a model's outputs.

    Raises:
        UserError: its data, which say what it predicts, are not known.
    """
    target, temperature = facts.get("target", "class"), facts.get("temperature", 1.0)
    if target == "number":
        return ANumber(facts.get("number_mean", 0.0), facts.get("number_std", 1.0))
    names = names_of(facts)
    if target == "classes":
        return ManyClasses(names, temperature, options.get("threshold", THRESHOLD))
    return OneClass(names, temperature, options.get("top", TOP))
