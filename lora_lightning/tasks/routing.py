"""Which adapter an utterance goes to: by its label, or by a router for speech without labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.manage import adapters_off, set_adapter
from lora_lightning.adapters.mixed_batch import mixed_adapters
from lora_lightning.data.speech import Utterance, collate
from lora_lightning.report import specs
from lora_lightning.report.page import Section, leave, table, text
from lora_lightning.tasks.error_rates import Transcript
from lora_lightning.tasks.recognizer import Recognizer
from lora_lightning.tasks.reporting import AFTER, BEFORE
from lora_lightning.tasks.speech_report import Heard, percent, rates, transcribe_all, worst
from lora_lightning.tasks.speech_sounds import Sounds
from lora_lightning.utils.tables import format_table

MIXED = 32  # utterances of a mixed batch
WORST = 4  # utterances of each accent on the page
BASE, BY_LABEL = "base", "routed by label"
TITLE = "All adapters in one model"
SHRINKAGE = 0.1  # of the covariance towards its diagonal


class Router:
    """The nearest centroid in the space of a base model's mean features.

    Distances are Mahalanobis's under one covariance for all groups (Fisher's linear discriminant), because
    most of what differs between utterances is the speaker and the words, not the accent.
    """

    def __init__(self, features: Tensor, labels: Sequence[str]) -> None:
        """Fit to features (n, dim) and the label of each."""
        self.names = sorted(set(labels))
        member = torch.tensor([self.names.index(label) for label in labels])
        self.centroids = torch.stack([features[member == i].mean(0) for i in range(len(self.names))])
        within = features - self.centroids[member]
        covariance = within.T @ within / len(within)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * torch.diag(covariance.diagonal() + 1e-6)
        self.precision = torch.linalg.inv(covariance)

    def __call__(self, features: Tensor) -> list[str]:
        """The label of each row of features (n, dim)."""
        gaps = features[:, None] - self.centroids  # (n, groups, dim)
        distances = torch.einsum("ngi,ij,ngj->ng", gaps, self.precision, gaps)
        return [self.names[i] for i in distances.argmin(1).tolist()]


def mean_features(task: Recognizer, utterances: Sequence[Utterance]) -> Tensor:
    """(n, width): what the base model's head sees, averaged over the frames of each utterance."""
    rows = []
    model: Any = task.eval().model  # with `features`
    with torch.no_grad(), adapters_off(task):
        for start in range(0, len(utterances), MIXED):
            batch = collate(utterances[start : start + MIXED])
            x, frames = model.features(batch.waves.to(task.device), batch.lengths.to(task.device))
            inside = torch.arange(x.shape[1], device=x.device) < frames[:, None]
            rows.append((x * inside[..., None]).sum(1) / frames[:, None])
    return torch.cat(rows).cpu()


def transcribe_mixed(
    task: Recognizer, utterances: Sequence[Utterance], adapters: Sequence[str | None]
) -> list[Transcript]:
    """What is heard in each utterance by its own adapter, in batches in which all adapters meet."""
    heard: list[str] = [""] * len(utterances)
    order = torch.randperm(len(utterances), generator=torch.Generator().manual_seed(0)).tolist()
    task.eval()
    for start in range(0, len(order), MIXED):
        rows = order[start : start + MIXED]
        batch = collate([utterances[i] for i in rows])
        with torch.no_grad(), mixed_adapters(task, [adapters[i] for i in rows]):
            texts = task.transcribe(batch.waves.to(task.device), batch.lengths.to(task.device))
        for i, one in zip(rows, texts, strict=True):
            heard[i] = one
    return [Transcript(u.id, u.accent, u.speaker, u.text, h) for u, h in zip(utterances, heard, strict=True)]


def report_together(
    task: Recognizer, data: dict[str, Any], folder: Path, tested: Mapping[str, Heard]
) -> list[str]:
    """Several adapters in one model: each accent by the base, by every adapter, routed by its label, and
    by a router that has not seen the label; and what is heard worst by its own adapter.

    Args:
        task: with all adapters loaded.
        data: the data module that each adapter was trained on, set up.
        tested: what the test of an adapter has heard, by the state of the model; it is not heard again.

    Returns:
        Lines to print; the same as numbers are in adapters.json, and as sections of the page.
    """
    utterances = list({u.id: u for module in data.values() for u in module.test_set}.values())
    owner = {u.accent: name for name, module in data.items() for u in module.train_set}
    own = [owner.get(u.accent) for u in utterances]
    heard: dict[str, list[Transcript]] = {}
    with adapters_off(task):
        heard[BASE] = _heard(task, utterances, [one.get(BEFORE, ()) for one in tested.values()])
    for name in data:
        set_adapter(task, name)
        heard[name] = _heard(task, utterances, [tested.get(name, {}).get(AFTER, ())])
    heard[BY_LABEL] = transcribe_mixed(task, utterances, own)
    lines: list[str] = []
    guessed: list[str] = []
    if hasattr(task.model, "features"):
        known = {u.id: u for module in data.values() for u in [*module.train_set, *module.val_set]}
        labels = [owner.get(u.accent) or BASE for u in known.values()]
        router = Router(mean_features(task, list(known.values())), labels)
        guessed = router(mean_features(task, utterances))
        heard["routed by nearest centroid"] = [
            heard[name][i] for i, name in enumerate(guessed)
        ]  # each row as alone: what a mixed batch promises
        right = sum(g == (o or BASE) for g, o in zip(guessed, own, strict=True))
        lines.append(f"The router sends {100 * right / len(own):.1f} % of the utterances to the right one.")
    alone = [heard[o or BASE][i].hypothesis for i, o in enumerate(own)]
    same = sum(a == t.hypothesis for a, t in zip(alone, heard[BY_LABEL], strict=True))
    lines.append(f"Mixed batches: {same} of {len(own)} transcripts are those of the adapter by itself.")
    accents = list(dict.fromkeys(u.accent for u in utterances))
    accents.sort(key=lambda accent: accent not in owner)  # what was adapted to comes first
    rows = [
        (accent, *(percent([t for t in part if t.accent == accent]) for part in heard.values()))
        for accent in accents
    ]
    header = ("WER %", *heard)
    (folder / "adapters.json").write_text(json.dumps({"header": header, "rows": rows}, indent=2) + "\n")
    sections = [_overview(heard, accents, table(header, rows), lines)]
    if guessed:
        sections.append(_routes(utterances, guessed, accents, [*data, BASE]))
    sections += _worst(task, utterances, heard, owner, accents)
    leave(folder, sections, TITLE)
    return ["", TITLE, "", format_table(header, rows), "", *lines]


def _heard(
    task: Recognizer, utterances: Sequence[Utterance], tests: Sequence[Sequence[Transcript]]
) -> list[Transcript]:
    """What the model as it is hears in each utterance, of which tests have heard some."""
    known = {transcript.id: transcript for one in tests for transcript in one}
    rest = [utterance for utterance in utterances if utterance.id not in known]
    known |= {transcript.id: transcript for transcript in transcribe_all(task, rest)}
    return [known[utterance.id] for utterance in utterances]


def _overview(heard: Heard, accents: Sequence[str], numbers: str, lines: Sequence[str]) -> Section:
    """Each accent by the base, by every adapter and routed."""
    transcripts = next(iter(heard.values()))
    places = {a or "unknown": [i for i, t in enumerate(transcripts) if t.accent == a] for a in accents}
    colours = dict(zip(heard, (f"var(--c{1 + i % 8})" for i in range(len(heard))), strict=True))
    colours[BASE] = specs.STATES["before"]
    words = "".join(f"<p>{text(line, 200)}</p>" for line in lines)
    return Section(TITLE, words + rates(heard, "accent", places, colours) + numbers)


def _routes(
    utterances: Sequence[Utterance], guessed: Sequence[str], accents: Sequence[str], names: Sequence[str]
) -> Section:
    """Which adapter the router takes for the utterances of each accent."""
    cells = Counter((u.accent, name) for u, name in zip(utterances, guessed, strict=True))
    rows = [(accent, *(str(cells[accent, name]) for name in names)) for accent in accents]
    lead = (
        "<p>Utterances of each accent, by the adapter that a router takes which has not seen the label.</p>"
    )
    return Section("Where the router sends them", lead + table(("accent", *names), rows))


def _worst(
    task: Recognizer,
    utterances: Sequence[Utterance],
    heard: Heard,
    owner: dict[str, str],
    accents: Sequence[str],
) -> list[Section]:
    """Of each accent that has an adapter, by that adapter and by the base."""
    sounds, both = Sounds(), {BASE: heard[BASE], "its own adapter": heard[BY_LABEL]}
    sections = []
    for accent in accents:
        if accent in owner:
            set_adapter(task, owner[accent])
            sections += worst(task, utterances.__getitem__, both, [accent], WORST, sounds)
    return sections
