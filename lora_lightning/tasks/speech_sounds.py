"""An utterance on a page: its sound, and its spectrogram with words and letters where the model hears."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora_lightning.data.speech import SAMPLE_RATE, Utterance, collate
from lora_lightning.report.page import text
from lora_lightning.tasks.recognizer import Recognizer
from lora_lightning.tasks.vocabulary import encode
from lora_lightning.utils.libraries import loading

with loading("torchaudio"):
    from torchaudio.functional import forced_align
    from torchaudio.transforms import MelSpectrogram

MELS, WINDOW, HOP = 64, 512, 160  # bands, and samples
SECOND, TALL, LINE = 300.0, 96, 13  # pixels of a second, of the spectrogram, of a line of letters
LETTER, WORD = 7.0, 6.6  # pixels that a letter takes, alone and in a word
LONGEST = 20.0  # seconds that are played and shown
Place = tuple[str, float]  # a letter or word, and the second at which it begins


class Sounds:
    """Players for a page, until they are as large together as they may be.

    Args:
        most: bytes of all sounds.
    """

    def __init__(self, most: int = 2_000_000) -> None:
        self.left = most
        mp3 = "MP3" in soundfile.available_formats()
        self.format, self.kind = ("MP3", "mpeg") if mp3 else ("FLAC", "flac")
        self.options = {"compression_level": 0.8} if mp3 else {}

    def player(self, wave: Tensor, name: str) -> str:
        """A player of the first 20 seconds, as HTML; a word instead once there is no room.

        Args:
            wave: (samples,), 16 kHz.
            name: of the utterance, for those who cannot see it.
        """
        file = io.BytesIO()
        sound = wave[: int(LONGEST * SAMPLE_RATE)].clamp(-1, 1).cpu().numpy()
        soundfile.write(file, sound, SAMPLE_RATE, format=self.format, **self.options)
        data = file.getvalue()
        if len(data) > self.left:
            return '<p class="soft">Its sound is left out: the page is large enough.</p>'
        self.left -= len(data)
        source = f"data:audio/{self.kind};base64,{base64.b64encode(data).decode()}"
        return f'<audio controls preload="none" aria-label="{text(name)}" src="{source}"></audio>'


def spectrogram(wave: Tensor, letters: Sequence[Place]) -> str:
    """The first 20 seconds, low notes below, under them a line of words and one of letters, each where it
    begins or as near behind it as there is room; it scrolls in itself.

    Args:
        wave: (samples,), 16 kHz.
        letters: with the second at which each begins; none where the model does not align.
    """
    wave = wave[: int(LONGEST * SAMPLE_RATE)].cpu()
    seconds = len(wave) / SAMPLE_RATE
    width = SECOND * seconds
    words = words_of(letters)
    rows = [_row(words, WORD), _row([p for p in letters if p[0] not in " |"], LETTER)] if words else []
    parts = [
        f'<image href="{_shades(wave)}" width="{width:.0f}" height="{TALL}" preserveAspectRatio="none"/>'
    ]
    for i, row in enumerate(rows):
        parts += [f'<text x="{at:.1f}" y="{TALL + LINE * (i + 1)}">{text(shown)}</text>' for shown, at in row]
    for _, second in words:
        parts.append(f'<path d="M{SECOND * second:.1f} 0v{TALL}"/>')
    spoken = ", ".join(f"{word} at {second:.1f} s" for word, second in words)
    label = f"spectrogram of {seconds:.1f} seconds" + (f": {spoken}" if spoken else "")
    high = TALL + LINE * len(rows) + 4
    width = max([width, *(at + LETTER * len(shown) for row in rows for shown, at in row[-1:])])
    return (
        f'<div class="wide"><svg class="sound" role="img" aria-label="{text(label, 2000)}" '
        f'viewBox="0 0 {width:.0f} {high}" style="width:{width:.0f}px">{"".join(parts)}</svg></div>'
    )


def words_of(letters: Sequence[Place]) -> list[Place]:
    """Each word with the second at which its first letter begins."""
    words: list[Place] = []
    begun = False
    for letter, second in letters:
        if letter in " |":
            begun = False
        elif begun:
            words[-1] = words[-1][0] + letter, words[-1][1]
        else:
            words.append((letter, second))
            begun = True
    return words


def _row(places: Sequence[Place], letter: float) -> list[Place]:
    """A line in which nothing covers another and all stays in order, with places in pixels."""
    row: list[Place] = []
    end = 0.0
    for shown, second in places:
        at = max(end, SECOND * second)
        row.append((shown, at))
        end = at + letter * len(shown)
    return row


def _shades(wave: Tensor) -> str:
    """A spectrogram as the address of a picture, dark where it is loud."""
    padded = F.pad(wave, (0, max(0, WINDOW - len(wave))))
    mels = MelSpectrogram(SAMPLE_RATE, WINDOW, hop_length=HOP, n_mels=MELS)(padded)
    mels = (mels + 1e-6).log().flip(0)
    loud = (mels - mels.min()) / (mels.max() - mels.min() + 1e-6)
    shades = 255 - 8 * (31 * loud).round()  # few shades are few bytes
    file = io.BytesIO()
    Image.fromarray(shades.byte().numpy()).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def aligned(task: Recognizer, utterance: Utterance) -> list[Place]:
    """Each character of an utterance's text with the second at which it begins, by the most probable CTC
    path; empty where the text does not fit into the frames, or the model does not align."""
    if not task.aligns:
        return []
    batch = collate([utterance])
    with torch.no_grad():
        log_probs, frames = task.eval()(batch.waves.to(task.device), batch.lengths.to(task.device))
    targets, lengths = encode(batch.texts, batch.ids, task.vocabulary)
    repeats = int((targets[1:] == targets[:-1]).sum())
    if not len(targets) or int(frames[0]) < len(targets) + repeats:
        return []
    path = forced_align(log_probs.float().cpu(), targets[None], frames.cpu(), lengths)[0][0].tolist()
    starts = [i for i, (now, last) in enumerate(zip(path, [0, *path], strict=False)) if now not in (0, last)]
    step = len(utterance.wave) / SAMPLE_RATE / int(frames[0])
    return [(task.vocabulary[path[i]], i * step) for i in starts]
