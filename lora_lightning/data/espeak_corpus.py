"""Makes a corpus of synthetic speech in several accents with eSpeak NG.

python -m lora_lightning.data.espeak_corpus FOLDER
python -m lora_lightning.data.espeak_corpus FOLDER --accents us --train 4000 --speakers many
python -m lora_lightning.data.espeak_corpus FOLDER --accents lancaster rp --words my_words.txt

eSpeak NG is under the GPL-3 and comes with the extra `espeak`. Nothing in the package imports this
module: it runs as a program of its own, and what it leaves are audio files and a manifest.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from lora_lightning.utils.libraries import loading
from lora_lightning.utils.progress import working

with loading("torchaudio"):
    from torchaudio.transforms import Resample

SAMPLE_RATE = 16_000
ACCENTS = {  # the names of eSpeak NG's voices
    "us": "en-us",
    "scottish": "en-gb-scotland",
    "caribbean": "en-029",
    "newyork": "en-us-nyc",
    "british": "en",
    "rp": "en-gb-x-rp",
    "lancaster": "en-gb-x-gbclan",
    "westmidlands": "en-gb-x-gbcwmd",
}
SPEAKERS = {  # eSpeak NG's voice variants; nobody is in two parts
    "train": ["m1", "m2", "m3", "m4", "f1", "f2", "f3", "Annie"],
    "val": ["m8", "linda"],
    "test": ["m5", "m7", "f4", "f5"],
}
MORE_SPEAKERS = (
    "Alex Alicia Andrea Andy Denis Gene Jacky Lee Marco Michael Mike adam anika antonio belinda benjamin"
    " boris caleb david ed edward john marcelo max miguel norbert pablo paul quincy rob robert sandro steph"
    " travis victor zac"
)
WORDS = (
    "zero one two three four five six seven eight nine red blue green white black yellow orange purple up"
    " down left right north south east west open close start stop turn move set call play find door light"
    " window radio music garden kitchen water car phone bath please now again last half hot more over under"
    " after house morning hour"
)
WORDS_A_SENTENCE = (3, 6)
WORDS_A_MINUTE = (140, 200)
PITCH = (25, 75)  # of eSpeak NG's scale from 0 to 99
GRID = SAMPLE_RATE // 100  # utterances begin and end at hundredths of a second
NOISE = 0.001  # of full scale, so that silence is not digital
COLUMNS = ("id", "path", "start", "end", "text", "accent", "speaker", "split")
NOTE = """# {name}

Synthetic speech in {accents}: {count} utterances, {minutes:.0f} minutes, {megabytes:.1f} MB of Ogg Opus.
`manifest.tsv` names the file, start and end (seconds), text, accent, speaker and split of each; no speaker
and no sentence is in two splits. `corpus.json` holds how it was made and the SHA-256 of every file.

Made by `python -m lora_lightning.data.espeak_corpus` with {engine}, a program under
the GPL-3. Recorded here is its output, which is no copy of the program or of its data; the sentences are
random sequences of {words} words of our own. You may use these files under Apache-2.0, as this package.
"""


class Engine:
    """eSpeak NG, called as a shared library. It keeps its state in globals: one engine a process, and the
    samples of an utterance depend a little on those before it."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise SystemExit("this needs eSpeak NG (GPL-3): pip install 'lora-lightning[espeak]'") from None
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        synchronous, no_exit = 2, 0x8000
        data = str(espeakng_loader.get_data_path()).encode()
        self.sample_rate = self.library.espeak_Initialize(synchronous, 0, data, no_exit)
        if self.sample_rate <= 0:
            raise SystemExit(f"eSpeak NG does not start with its data in {data.decode()}")
        self.resample = Resample(self.sample_rate, SAMPLE_RATE)
        self.library.espeak_Info.restype = ctypes.c_char_p
        self.chunks: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._collect)  # must outlive every call
        self.library.espeak_SetSynthCallback(self.callback)

    @property
    def version(self) -> str:
        return f"eSpeak NG {self.library.espeak_Info(None).decode()}"

    def _collect(self, samples: ctypes._Pointer, count: int, events: int | None) -> int:
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, speaker: str, pitch: int, rate: int) -> torch.Tensor:
        """(samples,) at 16 kHz, in [-1, 1]."""
        name = f"{voice}+{speaker}"
        if self.library.espeak_SetVoiceByName(name.encode()):
            raise SystemExit(f"eSpeak NG has no voice {name}")
        for number, value in ((1, rate), (3, pitch)):  # espeakRATE, espeakPITCH
            self.library.espeak_SetParameter(number, value, 0)
        self.chunks.clear()
        spoken = ctypes.create_string_buffer(text.encode())
        utf8 = 1
        failed = self.library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken)), 0, 1, 0, utf8, None, None)
        if failed:
            raise SystemExit(f"eSpeak NG cannot speak {text!r} ({failed})")
        wave = torch.from_numpy(np.frombuffer(b"".join(self.chunks), np.int16) / np.float32(32768))
        return self.resample(wave)


class Sentence(NamedTuple):
    text: str
    accent: str
    speaker: str
    split: str
    pitch: int
    rate: int


def split_of(text: str) -> str:
    """The split to which a sentence belongs in every corpus, by its hash: what one is trained on is in no
    other's test."""
    share = hashlib.sha256(text.encode()).digest()[0] / 256
    return "test" if share < 0.2 else "val" if share < 0.3 else "train"


def sentences(
    accents: Sequence[str],
    sizes: dict[str, int],
    speakers: dict[str, list[str]],
    words: list[str],
    tested: Sequence[str],
    seed: int,
) -> Iterator[Sentence]:
    """What is to be said, by whom and how; no text comes twice in a corpus."""
    draw = random.Random(seed)
    said: set[str] = set()
    for accent in accents:
        for split in ("val", "test") if accent in tested else sizes:
            for i in range(sizes[split]):
                while True:
                    text = " ".join(draw.choices(words, k=draw.randint(*WORDS_A_SENTENCE)))
                    if text not in said and split_of(text) == split:
                        break
                said.add(text)
                speaker = speakers[split][i % len(speakers[split])]
                yield Sentence(
                    text, accent, speaker, split, draw.randint(*PITCH), draw.randint(*WORDS_A_MINUTE)
                )


def write_corpus(
    folder: Path, plan: list[Sentence], engine: Engine, compression: float
) -> list[dict[str, str]]:
    """Speak everything, one file for each accent and split; gives the rows of the manifest."""
    noise = torch.Generator().manual_seed(0)
    rows: list[dict[str, str]] = []
    files: dict[str, soundfile.SoundFile] = {}
    try:
        for number, sentence in enumerate(working(plan, "speaking", "utterances")):
            name = f"{sentence.accent}-{sentence.split}.opus"
            if name not in files:
                files[name] = soundfile.SoundFile(
                    folder / name,
                    "w",
                    SAMPLE_RATE,
                    channels=1,
                    format="OGG",
                    subtype="OPUS",
                    compression_level=compression,
                )
            wave = engine.speak(
                sentence.text, ACCENTS[sentence.accent], sentence.speaker, sentence.pitch, sentence.rate
            )
            wave = torch.nn.functional.pad(wave, (0, -len(wave) % GRID))
            wave = wave + NOISE * torch.randn(len(wave), generator=noise)
            start = files[name].tell()
            files[name].write(wave.clamp(-1, 1).numpy())
            rows.append({
                "id": f"{sentence.accent}-{sentence.split}-{number:05d}",
                "path": name,
                "start": f"{start / SAMPLE_RATE:.2f}",
                "end": f"{(start + len(wave)) / SAMPLE_RATE:.2f}",
                "text": sentence.text,
                "accent": sentence.accent,
                "speaker": sentence.speaker,
                "split": sentence.split,
            })  # fmt: skip
    finally:
        for file in files.values():
            file.close()
    return rows


def describe(folder: Path, rows: list[dict[str, str]], engine: Engine, options: dict[str, object]) -> None:
    """manifest.tsv, corpus.json and README.md beside the audio."""
    with open(folder / "manifest.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    files = sorted([*folder.glob("*.opus"), folder / "manifest.tsv"])
    made = {
        "made_by": engine.version.partition("  Data")[0],
        "options": options,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    (folder / "corpus.json").write_text(json.dumps(made, indent=2) + "\n")
    (folder / "README.md").write_text(
        NOTE.format(
            name=folder.name,
            accents=", ".join(dict.fromkeys(row["accent"] for row in rows)),
            count=len(rows),
            minutes=sum(float(row["end"]) - float(row["start"]) for row in rows) / 60,
            megabytes=sum(file.stat().st_size for file in files) / 1e6,
            engine=made["made_by"],
            words=len({word for row in rows for word in row["text"].split()}),
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lora_lightning.data.espeak_corpus", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="is made; must not exist")
    parser.add_argument("--accents", nargs="+", choices=ACCENTS, default=["us", "scottish", "caribbean"])
    parser.add_argument("--train", type=int, default=400, help="utterances an accent (default 400)")
    parser.add_argument("--val", type=int, default=120)
    parser.add_argument("--test", type=int, default=250)
    parser.add_argument("--tested", nargs="*", default=["us"], help="accents without a training part")
    parser.add_argument("--speakers", choices=("few", "many"), default="few", help="8 or 44 to train on")
    parser.add_argument("--words", type=Path, help="a text file of words instead of the 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compression", type=float, default=0.97, help="of Opus, 0 to 1 (default 0.97)")
    given = parser.parse_args(arguments)
    if given.folder.exists():
        raise SystemExit(f"{given.folder} exists: delete it, or name another folder.")
    words = (given.words.read_text().lower() if given.words else WORDS).split()
    speakers = dict(SPEAKERS)
    if given.speakers == "many":
        speakers["train"] = [*speakers["train"], *MORE_SPEAKERS.split()]
    sizes = {"train": given.train, "val": given.val, "test": given.test}
    engine = Engine()
    given.folder.mkdir(parents=True)
    plan = list(sentences(given.accents, sizes, speakers, words, given.tested, given.seed))
    rows = write_corpus(given.folder, plan, engine, given.compression)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items() if k != "folder"}
    describe(given.folder, rows, engine, options)
    print((given.folder / "README.md").read_text())


if __name__ == "__main__":
    main()
