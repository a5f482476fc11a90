"""Aim: tables as text, examples as pictures and sounds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.trainer.trackers.tracker import Example, Tracker, as_markdown


class AimTracker(Tracker):
    """Of Aim's own AimLogger."""

    shows = True

    def begin(self) -> None:
        for tag in getattr(self.logger, "lora_tags", ()):  # its constructor takes none
            self.logger.experiment.add_tag(tag)

    def where(self) -> str:
        repo = self.logger.experiment.repo.path
        return f"Aim: {repo}. To see it: aim up --repo {repo}"

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        aim = importlib.import_module("aim")
        self.logger.experiment.track(aim.Text(as_markdown(header, rows)), name=name)

    def examples(self, name: str, examples: Sequence[Example]) -> None:
        if not examples:
            return
        aim, run, first = importlib.import_module("aim"), self.logger.experiment, examples[0]
        for state in first.pictures:
            shown = [aim.Image(one.pictures[state], caption=_caption(one)) for one in examples]
            run.track(shown, name=name, context={"state": state})
        sounds = [
            aim.Audio(_in_16_bits(one), rate=one.rate, format="wav", caption=_caption(one))
            for one in examples
            if one.sound is not None
        ]
        if sounds:
            run.track(sounds, name=name, context={"state": "sound"})
        words = [[one.name, *one.words.values()] for one in examples]
        self.table(f"{name}/words", ["name", *first.words], words)

    def summary(self, values: Mapping[str, float]) -> None:
        self.logger.experiment["final"] = dict(values)

    def id(self) -> str | None:
        return self.logger.experiment.hash


def _caption(one: Example) -> str:
    return ", ".join([one.name, *(f"{word}: {said}" for word, said in one.words.items())])


def _in_16_bits(one: Example) -> Any:
    """As Aim writes sounds, whole numbers (samples, 1)."""
    assert one.sound is not None
    return (one.sound.cpu().clamp(-1, 1) * 32767).short().numpy()[:, None]
