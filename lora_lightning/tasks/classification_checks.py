"""What is wrong in the options of a classifier taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.utils.marks import is_number, is_whole

A_CLASS = ("class_names", "class_weights", "logit_adjustment")  # lists of one thing a class


def problems_of(options: Mapping[str, Any]) -> list[str]:
    """One line for each problem; options of a wrong kind are left to their own checks."""
    number, target = options["num_classes"], options["target"]
    if not is_whole(number):
        return []
    problems = []
    if target == "class" and number == 1:
        problems.append("num_classes=1: give a whole number of at least 2; a number has target=number.")
    if target == "number" and number != 1:
        problems.append(f"num_classes={number}: target=number has one output: give 1.")
    given = f"num_classes={number}"
    logits = getattr(options["model"], "num_classes", number)
    if logits != number:
        problems.append(f"{given}: the model gives {logits} logits; build it with {given}.")
    for name in A_CLASS:
        values = options[name]
        if not isinstance(values, Sequence) or isinstance(values, str):
            continue
        if target == "number":
            problems.append(f"{name}: a number has no classes: give null.")
        elif len(values) != number:
            problems.append(f"{name}: {len(values)} entries for {given}: give one for each class.")
    if target == "number" and options["label_smoothing"]:
        problems.append(f"label_smoothing={options['label_smoothing']}: a number has no labels: give 0.")
    weights = options["class_weights"]
    low = [w for w in weights if is_number(w) and w < 0] if isinstance(weights, Sequence) else []
    problems += [f"class_weights: {weight} is below 0: give no less." for weight in low[:1]]
    return problems
