"""Augmentation of waveforms for training: speed, noise and gain, each with its published range."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from lora_lightning.data.audio import SUFFIXES, audio_info, read_audio
from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.utils.checks import Options
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, between, listed, number

with loading("torchaudio"):
    from torchaudio.functional import add_noise, resample


def noise_files(folder: str) -> list[Path]:
    """Every audio file under a folder."""
    return sorted(p for p in Path(folder).expanduser().rglob("*") if p.suffix.lower() in SUFFIXES)


def _two(allowed: str, low: float, high: float) -> Check:
    return listed(f"two {allowed}", number(between(low, high)), count=2, ascending=True)


NOISES = Check("a folder with audio files", lambda v: isinstance(v, str) and bool(noise_files(v)))


@dataclass
class Augmentation(Options):
    """What is done to a training utterance, drawn anew each time; random numbers come from Python's and
    torch's global generators. Masks on features (SpecAugment) are the model's own option.

    Args:
        speed: factors of which one is drawn, such as [0.9, 1.0, 1.1] (Ko et al. 2015); None for none.
        noise_snr: least and greatest signal-to-noise ratio in dB, such as [0, 15] for recorded noise
            (Snyder et al. 2015, arXiv 1510.08484, as Kaldi uses it); None for no noise.
        noise_prob: share of utterances that get noise.
        noise_dir: folder of recorded noises; None takes white noise.
        gain_db: least and greatest gain in dB; [-18, 6] is Kaldi's volume perturbation, factors 1/8 to 2
            (Peddinti et al. 2015); None for none.
    """

    owner = "the augmentation"

    speed: Annotated[
        Sequence[float] | None,
        listed("factors from 0.5 to 2, such as [0.9, 1.0, 1.1]", number(between(0.5, 2))),
    ] = None
    noise_snr: Annotated[Sequence[float] | None, _two("ratios in dB, such as [0, 15]", -20, 100)] = None
    noise_prob: Annotated[float, between(0, 1, noun="a share")] = 0.5
    noise_dir: Annotated[str | None, NOISES] = None
    gain_db: Annotated[Sequence[float] | None, _two("gains in dB, such as [-18, 6]", -60, 40)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._noises = noise_files(self.noise_dir) if self.noise_dir else []

    def longest(self) -> float:
        """By how much an utterance can become longer."""
        return 1 / min(self.speed, default=1.0) if self.speed else 1.0

    def __call__(self, wave: Tensor, most: float = math.inf) -> Tensor:
        """(samples,) -> (samples',): the speed changes the length, never to more than `most` seconds."""
        if self.speed:
            allowed = [factor for factor in self.speed if len(wave) <= most * SAMPLE_RATE * factor]
            wave = at_speed(wave, random.choice(allowed or [1.0]))
        if self.noise_snr and random.random() < self.noise_prob:
            wave = with_noise(wave, self._noise(len(wave)), random.uniform(*self.noise_snr))
        if self.gain_db:
            wave = wave * 10 ** (random.uniform(*self.gain_db) / 20)
        return wave

    def _noise(self, samples: int) -> Tensor:
        """A random part of a random recording, repeated where it is too short."""
        if not self._noises:
            return torch.randn(samples)
        path = random.choice(self._noises)
        seconds = samples / SAMPLE_RATE
        start = random.uniform(0, max(0.0, audio_info(path).seconds - seconds))
        noise = read_audio(path, start, start + seconds)
        return noise.repeat(math.ceil(samples / len(noise)))[:samples]


def at_speed(wave: Tensor, factor: float) -> Tensor:
    """Tempo and pitch times `factor`, as sox does it: resampling (Ko et al. 2015)."""
    if factor == 1:
        return wave
    ratio = Fraction(factor).limit_denominator(100)
    return resample(wave, ratio.numerator, ratio.denominator)


def with_noise(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Noise of the same length added at a signal-to-noise ratio in dB; silence stays as it is."""
    if not wave.any() or not noise.any():
        return wave
    return add_noise(wave, noise, torch.tensor(snr))
