"""Which test pictures a classifier gets most wrong, as cards of a page."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.report.page import image, text
from lora_lightning.tasks.predictions import Predictions
from lora_lightning.tasks.reporting import BEFORE

MOST, FEW = 16, 8  # cards of a section
NAMED = 3  # classes of a card


def losses(found: Predictions) -> Tensor:
    """(count,) how wrong each picture is: minus the logarithm of its true class's probability; of several
    classes, the mean over them; of a number, the distance."""
    if found.target == "number":
        return (found.predicted - found.truths).abs()
    scaled = found.outputs / (found.temperature or 1.0)
    if found.target == "class":
        return F.cross_entropy(scaled, found.truths, reduction="none")
    return F.binary_cross_entropy_with_logits(scaled, found.truths.float(), reduction="none").mean(1)


def mistaken(found: Predictions) -> Tensor:
    """(count,) whether anything that is predicted is wrong; of numbers always."""
    if found.target == "number":
        return torch.ones(len(found), dtype=torch.bool)
    wrong = found.predicted != found.truths
    return wrong if found.target == "class" else wrong.any(1)


def confidence(found: Predictions) -> Tensor:
    """(count,) of what is predicted: its probability; of several classes, that of the surest mistake."""
    probabilities = found.probabilities()
    if found.target == "class":
        return probabilities.amax(1)
    wrong = found.predicted != found.truths
    return (torch.where(probabilities > 0.5, probabilities, 1 - probabilities) * wrong).amax(1)


def chosen(found: Predictions) -> dict[str, list[int]]:
    """Titles, and the pictures under them, each picture once."""
    wrong, loss = mistaken(found), losses(found)
    if found.target == "number":
        sections = {"The greatest errors": _by(loss, wrong, MOST)}
    else:
        sections = {
            "Most confidently wrong": _by(confidence(found), wrong, MOST),
            "The least probability for the truth": _by(loss, wrong, MOST + FEW),
        }
    before = found.as_before()
    if before is not None:
        gained = losses(before) - loss
        if found.target == "number":
            sections["Most gained by adaptation"] = _by(gained, gained > 0, FEW)
        else:
            was = mistaken(before)
            sections["Wrong before, right after"] = _by(losses(before), was & ~wrong, FEW)
            sections["Right before, wrong after"] = _by(loss, ~was & wrong, MOST + FEW)
    seen: set[int] = set()
    for title, indices in sections.items():
        most = MOST if title == next(iter(sections)) else FEW
        sections[title] = [i for i in indices if i not in seen][:most]
        seen.update(sections[title])
    return {title: indices for title, indices in sections.items() if indices}


def _by(values: Tensor, kept: Tensor, most: int) -> list[int]:
    """The pictures that are kept, the greatest values first; what is no number comes first."""
    indices = kept.nonzero()[:, 0]
    order = values[indices].nan_to_num(nan=float("inf")).argsort(descending=True, stable=True)
    return indices[order][:most].tolist()


def shown(data: Any, index: int) -> tuple[str, Image.Image | None]:
    """Name and picture of a test picture; without the picture where the data cannot show it (any more)."""
    if hasattr(data, "show"):
        with contextlib.suppress(OSError, UserError):
            name, picture = data.show("test", index)
            return str(name), picture
    return f"test picture {index}", None


def cards(found: Predictions, names: Sequence[str], indices: Sequence[int], data: Any) -> str:
    """Pictures with what they are, and what the model makes of them now and made of them before."""
    articles = []
    for index in indices:
        name, picture = shown(data, index)
        parts = [image(picture, name)] if picture is not None else []
        parts.append(f'<p class="soft"><small>{text(name, 80)}</small></p>')
        parts.append(f"<p>is <b>{truth_in_words(found, names, index)}</b></p>")
        for state, predictions in reversed(found.states().items()):
            parts.append(_said(predictions, names, index, state))
        articles.append(f'<article class="card">{"".join(parts)}</article>')
    return f'<div class="cards">{"".join(articles)}</div>'


def truth_in_words(found: Predictions, names: Sequence[str], index: int) -> str:
    """What a picture is, as HTML."""
    if found.target == "number":
        return f"{float(found.truths[index]):.4g}"
    if found.target == "class":
        return text(names[int(found.truths[index])])
    return (
        ", ".join(text(names[i]) for i in found.truths[index].nonzero()[:, 0].tolist())
        or "none of the classes"
    )


def _said(found: Predictions, names: Sequence[str], index: int, state: str) -> str:
    if found.target == "number":
        off = float(found.predicted[index] - found.truths[index])
        return f"<p>{state} {float(found.predicted[index]):.4g} <small>({off:+.3g})</small></p>"
    probabilities = found.probabilities_of(index)
    best = probabilities.sort(descending=True, stable=True)  # of equal ones the first, which is predicted
    truth = found.truths[index]
    bars: list[str] = []
    for share, i in zip(best.values[:NAMED].tolist(), best.indices[:NAMED].tolist(), strict=True):
        right = i == int(truth) if found.target == "class" else bool(truth[i])
        said = share > 0.5 if found.target == "classes" else not bars
        kind = ("right" if right else "wrong") if said else ""
        row, percent = "bar then" if state == BEFORE else "bar", f"{100 * share:.0f}"
        bars.append(
            f'<div class="{row}"><span class="{kind}">{text(names[i])}</span>'
            f'<i><b style="width:{percent}%"></b></i><em>{percent} %</em></div>'
        )
    return f'<p class="soft"><small>{state}</small></p>{"".join(bars)}'
