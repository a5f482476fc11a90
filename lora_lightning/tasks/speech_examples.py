"""What trackers are shown of a tested recognizer: utterances to play, with what was heard in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_lightning.data.speech import SAMPLE_RATE, Utterance, ids_of
from lora_lightning.tasks.error_rates import Transcript, count_errors
from lora_lightning.tasks.reporting import BEFORE
from lora_lightning.tasks.speech_report import Heard
from lora_lightning.tasks.speech_words import compared
from lora_lightning.trainer.trackers.tracker import Confusion, Example

CONFUSED = 20  # words
OTHERS, NOTHING = "(other words)", "(nothing)"


def examples_of(
    heard: Heard, kept: Sequence[str], utterances: Sequence[Utterance], most: int
) -> list[Example]:
    """Utterances of the accents that were trained: by turns the worst ones, and those that come first.

    Args:
        heard: in a test of the utterances, by the state of the model.
        kept: accents that were not trained.
        most: examples.
    """
    state, now = list(heard.items())[-1]
    trained = [t for t in now if t.accent not in kept] or now
    errors = count_errors(trained)[0] if trained else ()
    worst = [t for _, t in sorted(zip(errors, trained, strict=True), key=lambda pair: -pair[0])]
    turns = [t for pair in zip(worst, trained, strict=True) for t in pair]
    shown = list({t.id: t for t in turns}.values())[:most]
    place = {name: i for i, name in enumerate(ids_of(utterances))}
    before = {t.id: t.hypothesis for t in heard.get(BEFORE, ())}
    return [_example(t, before.get(t.id), utterances[place[t.id]], state) for t in shown]


def confusion_of(heard: Sequence[Transcript], most: int = CONFUSED) -> Confusion:
    """Words that were said, a row, and what was heard for them, a column: of the words that are wrong most
    often, with the others, and nothing, which is what was put in or left out.

    Args:
        most: words.
    """
    pairs = [pair for t in heard for pair in compared(t.reference, t.hypothesis)]
    wrong = Counter(word for p in pairs if p.kind != "right" for word in (p.said, p.heard) if word)
    words = sorted(word for word, _ in wrong.most_common(most))
    place = {word: i for i, word in enumerate([*words, OTHERS])} | {"": len(words) + 1}
    counts = [[0] * (len(words) + 2) for _ in range(len(words) + 2)]
    for pair in pairs:
        said, other = (place.get(word, len(words)) for word in (pair.said, pair.heard))
        counts[said][other] += 1
    return Confusion([*words, OTHERS, NOTHING], counts)


def _example(now: Transcript, before: str | None, utterance: Utterance, state: str) -> Example:
    words = {"accent": now.accent, "speaker": now.speaker, "said": now.reference}
    if before is not None:
        words["heard before"] = before
    words["heard after" if before is not None else f"heard, {state}"] = now.hypothesis
    return Example(now.id, words, sound=utterance.wave, rate=SAMPLE_RATE)
