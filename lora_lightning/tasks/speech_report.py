"""What a trained recognizer hears, in tables and on a page: accents, confusions, worst utterances to play."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from PIL import Image
from torch import Tensor

from lora_lightning.adapters.manage import adapters_off
from lora_lightning.adapters.state import is_injected
from lora_lightning.data.buckets import grouped
from lora_lightning.data.speech import SAMPLE_RATE, Utterance, collate
from lora_lightning.report.page import Section, leave
from lora_lightning.tasks.error_rates import Transcript, confusions, count_errors, error_rate
from lora_lightning.tasks.recognizer import Recognizer
from lora_lightning.tasks.vocabulary import encode
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.tables import format_table

with loading("torchaudio"):
    from torchaudio.functional import forced_align
    from torchaudio.transforms import MelSpectrogram


BATCH_SECONDS = 120.0  # padding counted
WORST = 12  # utterances on the page
PIXELS = 4  # a side of each cell of the spectrogram
STYLE = """<style>
audio{display:block;margin:.3em 0}article{margin:2em 0}
.sound{position:relative;overflow-x:auto;padding-bottom:1.6em;width:max-content;max-width:100%}
.sound img{display:block}.sound span{position:absolute;bottom:0;font:13px monospace}
</style>"""


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


def report(task: Recognizer, utterances: Sequence[Utterance], folder: Path) -> list[str]:
    """Tables of what was heard in test utterances, before (the adapter off) and after; the page report.html.

    Returns:
        Lines to print.
    """
    after = transcribe_all(task, utterances)
    before = None
    if is_injected(task):
        with adapters_off(task):
            before = transcribe_all(task, utterances)
    header, rows = by_accent(before, after)
    body = [
        _table(header, rows),
        "<h2>Words heard as others</h2>",
        _table(("said", "heard", "times"), _confusions(after)),
        "<h2>Speakers</h2>",
        _table(("speaker", "utterances", "WER %"), _by_speaker(after)),
        f"<h2>The {WORST} worst utterances</h2>",
        *_worst(task, utterances, before, after),
    ]  # fmt: skip
    accents = ", ".join(dict.fromkeys(t.accent or "unknown" for t in after))
    title = f"Heard: {accents}"
    leave(folder, [Section(title, STYLE + "\n".join(body))], title)
    return [format_table(header, rows), ""]


def by_accent(
    before: Sequence[Transcript] | None, after: Sequence[Transcript]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of error rates with intervals, one row an accent."""
    stages = {"adapter off": before, "adapter on": after} if before is not None else {"": after}
    header = ["accent", "utterances"]
    header += [f"{rate} %, {stage}".rstrip(", ") for rate in ("WER", "CER") for stage in stages]
    rows: list[tuple[str, ...]] = []
    for accent in dict.fromkeys(t.accent for t in after):
        parts = [[t for t in heard if t.accent == accent] for heard in stages.values() if heard is not None]
        cells = [percent(part, unit) for unit in ("word", "character") for part in parts]
        rows.append((accent or "unknown", str(len(parts[-1])), *cells))
    return tuple(header), rows


def percent(transcripts: Sequence[Transcript], unit: str = "word") -> str:
    """An error rate with its interval: 12.3 (10.1–14.6)."""
    rate, low, high = error_rate(transcripts, unit)
    return f"{100 * rate:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _confusions(heard: Sequence[Transcript]) -> list[tuple[str, ...]]:
    common = confusions(heard).most_common(20)
    return [(left or "–", right or "–", str(count)) for (left, right), count in common]


def _by_speaker(heard: Sequence[Transcript]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys((t.accent, t.speaker) for t in heard):
        part = [t for t in heard if (t.accent, t.speaker) == name]
        rows.append((" ".join(name), str(len(part)), percent(part)))
    return rows


def _worst(
    task: Recognizer,
    utterances: Sequence[Utterance],
    before: Sequence[Transcript] | None,
    after: Sequence[Transcript],
) -> list[str]:
    errors, lengths = count_errors(after)
    order = sorted(range(len(after)), key=lambda i: -errors[i] / max(1, lengths[i]))[:WORST]
    articles = []
    for i in order:
        old = f"<br>adapter off: {html.escape(before[i].hypothesis)}" if before else ""
        articles.append(
            f"<article><b>{html.escape(after[i].accent)} {html.escape(after[i].speaker)}</b>"
            f" {html.escape(after[i].id)}<br>said: {html.escape(after[i].reference)}{old}"
            f'<br>heard: <span class="wrong">{html.escape(after[i].hypothesis)}</span>'
            f"{_player(utterances[i].wave)}{_picture(task, utterances[i])}</article>"
        )
    return articles


def _player(wave: Tensor) -> str:
    file = io.BytesIO()
    soundfile.write(file, wave.numpy(), SAMPLE_RATE, format="FLAC")
    return f'<audio controls preload="none" src="data:audio/flac;base64,{_base64(file)}"></audio>'


def _picture(task: Recognizer, utterance: Utterance) -> str:
    """The spectrogram, low notes below, with each character of the text where the model aligns it."""
    mels = MelSpectrogram(SAMPLE_RATE, 512, hop_length=160, n_mels=32)(utterance.wave)
    mels = (mels + 1e-6).log().flip(0)
    shades = 255 * (1 - (mels - mels.min()) / (mels.max() - mels.min() + 1e-6))
    image = Image.fromarray(shades.byte().numpy()).resize((PIXELS * mels.shape[1], PIXELS * len(mels)))
    file = io.BytesIO()
    image.save(file, format="PNG")
    letters = "".join(
        f'<span style="left:{100 * at:.1f}%">{html.escape(c)}</span>' for c, at in aligned(task, utterance)
    )
    return f'<div class="sound"><img src="data:image/png;base64,{_base64(file)}">{letters}</div>'


def aligned(task: Recognizer, utterance: Utterance) -> list[tuple[str, float]]:
    """Each character of an utterance's text with the place where it begins, as a fraction of the whole, by
    the most probable CTC path; empty where the text does not fit into the frames."""
    if not task.aligns:
        return []
    batch = collate([utterance])
    with torch.no_grad():
        log_probs, frames = task.eval()(batch.waves.to(task.device), batch.lengths.to(task.device))
    targets, lengths = encode(batch.texts, batch.ids, task.vocabulary)
    repeats = int((targets[1:] == targets[:-1]).sum())
    if not len(targets) or int(frames[0]) < len(targets) + repeats:
        return []
    path = forced_align(log_probs.cpu(), targets[None], frames.cpu(), lengths)[0][0].tolist()
    starts = [i for i, (now, last) in enumerate(zip(path, [0, *path], strict=False)) if now not in (0, last)]
    return [(task.vocabulary[path[i]], i / int(frames[0])) for i in starts]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _base64(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()
