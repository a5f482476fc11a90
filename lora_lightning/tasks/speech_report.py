"""What a trained recognizer hears, in tables and on a page: accents, speakers, words, utterances to play."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lora_lightning.data.buckets import grouped
from lora_lightning.data.speech import Utterance, collate, ids_of
from lora_lightning.report import specs
from lora_lightning.report.charts import chart
from lora_lightning.report.page import Section, leave, table, text
from lora_lightning.tasks.error_rates import Transcript, confusions, count_errors, error_rate
from lora_lightning.tasks.recognizer import Recognizer
from lora_lightning.tasks.reporting import BEFORE
from lora_lightning.tasks.speech_sounds import Sounds, aligned, spectrogram
from lora_lightning.tasks.speech_words import as_html, compared
from lora_lightning.utils.plurals import counted
from lora_lightning.utils.tables import format_table

BATCH_SECONDS = 120.0  # padding counted
WORST, WORST_KEPT = 12, 4  # utterances on the page, of what was adapted to and of what was kept
CONFUSED = 15  # pairs of words
SPEAKERS, ROWS = 30, 1000  # in a chart, and in a table
Heard = Mapping[str, Sequence[Transcript]]  # by the state of the model, the last one what is now


def transcribe_all(task: Recognizer, utterances: Sequence[Utterance]) -> list[Transcript]:
    """What the task's model hears in each utterance, in eval mode."""
    training = task.training
    task.eval()
    heard: list[Transcript] = []
    with torch.no_grad():
        for group in grouped(utterances, BATCH_SECONDS):
            batch = collate(group)
            texts = task.transcribe(batch.waves.to(task.device), batch.lengths.to(task.device))
            columns = (batch.ids, batch.accents, batch.speakers, batch.texts, texts)
            heard += [Transcript(*row) for row in zip(*columns, strict=True)]
    task.train(training)
    return heard


def report(task: Recognizer, utterances: Sequence[Utterance], heard: Heard, folder: Path) -> list[str]:
    """Tables of what was heard in test utterances, before and after training, and sections of the
    page: what the model was adapted to comes first, then the accents that it was to keep.

    Args:
        utterances: all of the test data; a test may have heard a part of them.
        heard: by the state of the model, each in the same order.

    Returns:
        Lines to print.
    """
    place = {name: i for i, name in enumerate(ids_of(utterances))}
    order = sorted(range(len(_now(heard))), key=lambda i: place[_now(heard)[i].id])
    heard = {state: [transcripts[i] for i in order] for state, transcripts in heard.items()}
    accents = in_order(heard, task.kept)
    sections = [_accents(heard, task.kept), _speakers(heard, accents), _words(heard, accents)]
    sections += _worst(task, lambda i: utterances[place[_now(heard)[i].id]], heard, accents)
    leave(folder, sections, f"Heard: {', '.join(a or 'unknown accent' for a in accents)}")
    return [format_table(*by_accent(heard, accents)), ""]


def in_order(heard: Heard, kept: Sequence[str]) -> list[str]:
    """The accents, those that the model was adapted to first."""
    found = dict.fromkeys(t.accent for t in _now(heard))
    return sorted(found, key=lambda accent: accent in kept)


def _now(heard: Heard) -> Sequence[Transcript]:
    return list(heard.values())[-1]


def by_accent(heard: Heard, accents: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of error rates with intervals, one row an accent."""
    header = ["accent", "utterances"]
    header += [f"{rate} %, {state}" for rate in ("WER", "CER") for state in heard]
    rows: list[tuple[str, ...]] = []
    for accent in accents:
        parts = [[t for t in one if t.accent == accent] for one in heard.values()]
        cells = [percent(part, unit) for unit in ("word", "character") for part in parts]
        rows.append((accent or "unknown", str(len(parts[-1])), *cells))
    return tuple(header), rows


def percent(transcripts: Sequence[Transcript], unit: str = "word") -> str:
    """An error rate with its interval: 12.3 (10.1–14.6)."""
    rate, low, high = error_rate(transcripts, unit)
    return f"{100 * rate:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def rate_rows(heard: Heard, name: str, shown: Mapping[str, Sequence[int]]) -> list[dict[str, object]]:
    """What `specs.grouped` takes: the WER of groups of utterances, by state.

    Args:
        name: of the groups.
        shown: the places of each group's utterances.
    """
    rows: list[dict[str, object]] = []
    for group, places in shown.items():
        for state, transcripts in heard.items():
            rate, low, high = error_rate([transcripts[i] for i in places])
            values = {"WER %": 100 * rate, "low": 100 * low, "high": 100 * high}
            rows.append({name: group, "state": state, **values})
    return rows


def rates(heard: Heard, name: str, shown: Mapping[str, Sequence[int]], colours: Mapping[str, str]) -> str:
    """WER of groups of utterances with intervals, as a chart."""
    spec = specs.grouped(rate_rows(heard, name, shown), name, "state", "WER %", colours)
    return chart(spec, f"word error rate by {name}, with intervals")


def colours_of(heard: Heard) -> Mapping[str, str]:
    """Of the model's states."""
    return {state: specs.STATES[state] for state in heard}


def _accents(heard: Heard, kept: Sequence[str]) -> Section:
    accents = in_order(heard, kept)
    named = {a: f"{a or 'unknown'}{' (kept)' if a in kept else ''}" for a in accents}
    places = {named[a]: [i for i, t in enumerate(_now(heard)) if t.accent == a] for a in accents}
    header, rows = by_accent(heard, accents)
    words = ["Word error rates (WER) with 95 % intervals by the bootstrap over utterances."]
    if BEFORE in heard:
        words.append("“Before” is the same model before training.")
    for accent in (a for a in accents if a in kept and BEFORE in heard):
        was, now = (percent([t for t in one if t.accent == accent]) for one in heard.values())
        words.append(
            f"{accent}, which was to be kept, has a WER of {now} % after training, and of {was} % before."
        )
    lead = f"<p>{text(' '.join(words), 2000)}</p>"
    figure = rates(heard, "accent", places, colours_of(heard))
    return Section("Errors by accent", lead + figure + table(header, rows))


def _speakers(heard: Heard, accents: Sequence[str]) -> Section:
    found: dict[str, list[int]] = {}
    for accent in accents:
        for i, one in enumerate(_now(heard)):
            if one.accent == accent:
                found.setdefault(" ".join(filter(None, (accent, one.speaker))) or "unknown", []).append(i)
    most = sorted(found, key=lambda name: -len(found[name]))[:SPEAKERS]
    shown = {name: places for name, places in found.items() if name in most}
    note = f"The {SPEAKERS} with the most utterances." if len(found) > SPEAKERS else ""
    header = ("speaker", "utterances", *(f"WER %, {state}" for state in heard))
    rows = [
        (name, str(len(places)), *(percent([one[i] for i in places]) for one in heard.values()))
        for name, places in list(found.items())[:ROWS]
    ]
    every = f"<details><summary>All speakers in numbers</summary>{table(header, rows)}</details>"
    figure = rates(heard, "speaker", shown, colours_of(heard))
    return Section("Errors by speaker", f'<p class="soft">{note}</p>' * bool(note) + figure + every)


def _words(heard: Heard, accents: Sequence[str]) -> Section:
    parts = []
    for accent in accents:
        counts = {state: confusions([t for t in one if t.accent == accent]) for state, one in heard.items()}
        now = list(counts.values())[-1]
        rows = [
            (said or "–", other or "–", *(str(one[said, other]) for one in counts.values()))
            for (said, other), _ in now.most_common(CONFUSED)
        ]
        header = ("said", "heard", *(f"times, {state}" for state in heard))
        half = len(rows) if len(accents) > 1 else -(-len(rows) // 2)  # of one alone, two tables side by side
        if rows:
            parts.append(
                f"<div><h3>{text(accent or 'unknown accent')}</h3>{table(header, rows[:half], 2)}</div>"
            )
        if rows[half:]:
            parts.append(f"<div><h3>and less often</h3>{table(header, rows[half:], 2)}</div>")
    found = f'<div class="two">{"".join(parts)}</div>' if parts else "<p>None.</p>"
    return Section("Words heard as others", found)


def _worst(
    task: Recognizer, utterance: Callable[[int], Utterance], heard: Heard, accents: Sequence[str]
) -> list[Section]:
    """The worst utterances of what the model was adapted to, and fewer of what it was to keep."""
    sounds = Sounds()
    sections = []
    for old, most in ((False, WORST), (True, WORST_KEPT)):
        own = [a for a in accents if (a in task.kept) == old]
        sections += worst(task, utterance, heard, own, most, sounds)
    return sections


def worst(
    task: Recognizer,
    utterance: Callable[[int], Utterance],
    heard: Heard,
    accents: Sequence[str],
    most: int,
    sounds: Sounds,
) -> list[Section]:
    """A section of the utterances of some accents that are heard worst, aligned by the model as it is; none
    where all is right.

    Args:
        utterance: by its place in what was heard.
        most: of them.
    """
    errors, lengths = count_errors(_now(heard))
    order = sorted(range(len(errors)), key=lambda i: -errors[i] / max(1, lengths[i]))
    places = [i for i in order if _now(heard)[i].accent in accents and errors[i]][:most]
    if not places:
        return []
    cards = [_card(task, utterance(i), {s: one[i] for s, one in heard.items()}, sounds) for i in places]
    name, count = (
        ", ".join(a or "unknown accent" for a in accents),
        sum(t.accent in accents for t in _now(heard)),
    )
    lead = (
        '<p class="soft">Under each word that was said stands what was heard: → another word, − left out, '
        "+ put in.</p>"
    )
    return [
        Section(
            f"{name}: the worst {len(places)} of {counted(count, 'utterance')}",
            f'{lead}<div class="utterances">{"".join(cards)}</div>',
        )
    ]


def _card(task: Recognizer, utterance: Utterance, heard: Mapping[str, Transcript], sounds: Sounds) -> str:
    """An utterance to play, its spectrogram, and what was heard in it by each state."""
    name = " · ".join(filter(None, (utterance.accent, utterance.speaker, utterance.id)))
    parts = [f"<h3>{text(name, 100)}</h3>", sounds.player(utterance.wave, name)]
    parts.append(spectrogram(utterance.wave, aligned(task, utterance)))
    for state, one in heard.items():
        pairs = compared(one.reference, one.hypothesis)
        wrong, said = sum(p.kind != "right" for p in pairs), len(one.reference.split())
        parts.append(f'<p class="soft">{text(state)}: {_errors(wrong, said)}</p>')
        parts.append(as_html(pairs))
    return f'<article class="utterance">{"".join(parts)}</article>'


def _errors(wrong: int, said: int) -> str:
    return f"{counted(wrong, 'error')} in {counted(said, 'word')}"
