"""What trackers are shown of a tested recognizer: utterances to play, with what was heard in them."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lightning.adapters.manage import adapters_off
from lora_lightning.adapters.state import is_injected
from lora_lightning.data.speech import SAMPLE_RATE, Utterance
from lora_lightning.tasks.error_rates import Transcript, count_errors
from lora_lightning.tasks.recognizer import Recognizer
from lora_lightning.tasks.speech_report import transcribe_all
from lora_lightning.trainer.trackers.tracker import Example


def examples_of(
    task: Recognizer, heard: Sequence[Transcript], utterances: Sequence[Utterance], most: int
) -> list[Example]:
    """Utterances of the accents that were trained: by turns the worst ones, and those that come first.

    Args:
        heard: in all of the utterances.
        most: examples.
    """
    trained = [t for t in heard if t.accent not in task.kept] or list(heard)
    errors = count_errors(trained)[0] if trained else ()
    worst = [t for _, t in sorted(zip(errors, trained, strict=True), key=lambda pair: -pair[0])]
    turns = [t for pair in zip(worst, trained, strict=True) for t in pair]
    shown = list({t.id: t for t in turns}.values())[:most]
    sounds = _of(utterances, {t.id for t in shown})
    before: dict[str, str] = {}
    if is_injected(task) and sounds:
        with adapters_off(task):
            before = {t.id: t.hypothesis for t in transcribe_all(task, list(sounds.values()))}
    return [_example(t, before.get(t.id), sounds[t.id]) for t in shown if t.id in sounds]


def _of(utterances: Sequence[Utterance], ids: set[str]) -> dict[str, Utterance]:
    """Those of these ids, of which no more are read than are needed."""
    found: dict[str, Utterance] = {}
    for one in utterances:
        if len(found) == len(ids):
            break
        if one.id in ids:
            found[one.id] = one
    return found


def _example(now: Transcript, before: str | None, utterance: Utterance) -> Example:
    words = {"accent": now.accent, "speaker": now.speaker, "said": now.reference}
    if before is not None:
        words["heard before"] = before
    words["heard after"] = now.hypothesis
    return Example(now.id, words, sound=utterance.wave, rate=SAMPLE_RATE)
