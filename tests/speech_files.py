"""Small recordings, manifests and corpora in the formats of the real ones, for the tests of speech."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

WORDS = ("red", "left", "stop", "door", "nine", "radio", "seven", "music")


def tone(seconds: float = 0.6, rate: int = 16_000, pitch: float = 200.0, channels: int = 1) -> np.ndarray:
    """(samples, channels): a tone with overtones, not silent and not periodic in the file's length."""
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * pitch * t) + 0.1 * np.sin(2 * np.pi * 3.1 * pitch * t)
    return np.repeat(wave[:, None].astype(np.float32), channels, 1)


def write(path: Path, seconds: float = 0.6, rate: int = 16_000, pitch: float = 200.0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, pitch), rate, **options)
    return path


def sentence(number: int) -> str:
    return f"{WORDS[number % 8]} {WORDS[(3 * number + 1) % 8]}"


def manifest(folder: Path, speakers: int = 5, each: int = 4, suffix: str = ".csv", **columns) -> Path:
    """Recordings of several speakers; two accents, taken in turn."""
    rows = []
    for s in range(speakers):
        for u in range(each):
            path = write(folder / "audio" / f"s{s}-{u}.wav", 0.6 + 0.1 * u, pitch=120 + 40 * s + 15 * u)
            accent = ("Scottish", "Welsh")[s % 2]
            rows.append({
                "path": f"audio/{path.name}", "text": sentence(each * s + u),
                "speaker": f"s{s}", "accent": accent,
            } | columns)  # fmt: skip
    return table(folder / f"recordings{suffix}", rows)


def table(path: Path, rows: Sequence[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def common_voice(root: Path) -> Path:
    accents = ("Scottish English", "England English,Midlands")
    for name in ("train", "dev", "test", "validated"):
        rows = []
        for i in range(8 if name == "validated" else 4):
            clip = write(root / "clips" / f"common_voice_en_{name}{i}.mp3", 1.0, 32_000)
            rows.append({
                "client_id": f"{name}{i}", "path": clip.name, "sentence": f'The "{sentence(i)}".',
                "up_votes": "2", "accents": accents[i % 2],
            })  # fmt: skip
        table(root / f"{name}.tsv", rows)
    # As Mozilla writes them: quotes are characters.
    for path in root.glob("*.tsv"):
        path.write_text(path.read_text().replace('""', "'").replace('"', "").replace("'", '"'))
    return root


def vctk(root: Path) -> Path:
    lines = ["ID  AGE  GENDER  ACCENTS  REGION COMMENTS "]
    for s, accent in ((225, "English"), (234, "Scottish"), (237, "Scottish"), (241, "Scottish")):
        lines.append(f"p{s}  23  F    {accent}    Fife ")
        for u in range(1, 4):
            name = f"p{s}_{u:03d}"
            for mic in (1, 2):
                write(root / "wav48_silence_trimmed" / f"p{s}" / f"{name}_mic{mic}.flac", 0.8, 48_000)
            text = root / "txt" / f"p{s}" / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"{sentence(u if u == 1 else s + u).capitalize()}.\n")
    write(root / "wav48_silence_trimmed" / "p315" / "p315_001_mic1.flac", 0.8, 48_000)  # it has no text
    (root / "speaker-info.txt").write_text("\n".join(lines))
    return root


def l2_arctic(root: Path) -> Path:
    for speaker in ("ASI", "RRBI", "SVBI", "TNI", "HKK"):
        for u in range(10):
            name = f"arctic_a{u + 1:04d}"
            write(root / speaker / "wav" / f"{name}.wav", 0.8, 44_100)
            text = root / speaker / "transcript" / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(sentence(u) + ", etc.")
    return root


def librispeech(root: Path) -> Path:
    for subset, speaker in (("train-clean-100", 19), ("dev-clean", 84), ("test-clean", 61)):
        folder = root / subset / str(speaker) / "198"
        for u in range(3):
            write(folder / f"{speaker}-198-{u:04d}.flac", 0.9)
        lines = [f"{speaker}-198-{u:04d} {sentence(u).upper()}" for u in range(3)]
        (folder / f"{speaker}-198.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def cmu_arctic(root: Path) -> Path:
    for voice in ("awb", "bdl", "ksp", "slt"):
        folder = root / f"cmu_us_{voice}_arctic"
        for u in range(10):
            write(folder / "wav" / f"arctic_a{u + 1:04d}.wav", 0.8)
        (folder / "etc").mkdir()
        lines = [f'( arctic_a{u + 1:04d} "{sentence(u).capitalize()}, \\"so\\"." )' for u in range(10)]
        (folder / "etc" / "txt.done.data").write_text("\n".join(lines))
    return root
