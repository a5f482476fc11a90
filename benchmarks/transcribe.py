"""How fast speech is transcribed and loaded: seconds of computing for a second of audio.

    python -m benchmarks.transcribe

The embedded recognizer and wav2vec 2.0 base (of random weights, which cost the same) on long recordings;
beam search; reading and augmenting training batches in each format, which must be faster than a training
step. Writes results/transcribe.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import lora_lightning as ll
from benchmarks.measure import machine
from lora_lightning.app.recognizer import recognizer
from lora_lightning.data.accents import AccentsDataModule
from lora_lightning.data.buckets import Batches
from lora_lightning.data.manifests import Row
from lora_lightning.data.pipelines import labels
from lora_lightning.data.recordings import Utterances
from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.data.speech_augment import Augmentation
from lora_lightning.models.speech import pretrained_recognizer
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.decoding import BeamDecoder
from lora_lightning.tasks.transcription import Transcriber

RESULTS = Path(__file__).parent / "results"
PIPELINE = "WAV2VEC2_ASR_BASE_960H"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the recording that is transcribed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wave = recording(options.seconds)
    found = {
        "transcribe": transcribing(wave, options),
        "training step": training(options),
        "loading": loading(options),
    }
    about = {"seconds": options.seconds, "rounds": options.rounds, **machine(1, options.device)}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**about, "seconds of computing for a second of audio": found}, indent=2) + "\n"
    (RESULTS / "transcribe.json").write_text(text)
    print(text)


def recording(seconds: float) -> torch.Tensor:
    """Utterances of the embedded corpus with pauses between them, (samples,)."""
    data = AccentsDataModule(accent="scottish", kept=["us"])
    data.setup("test")
    parts: list[torch.Tensor] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts += [data.test_set[len(parts)].wave, torch.zeros(SAMPLE_RATE // 2)]
    return torch.cat(parts)[: int(seconds * SAMPLE_RATE)]


def transcribing(wave: torch.Tensor, options: Any) -> dict[str, float]:
    seconds = len(wave) / SAMPLE_RATE
    small, vocabulary = recognizer(None, "accent_espeak")
    large = pretrained_recognizer(PIPELINE, labels(PIPELINE), pretrained=False)
    models = {"embedded recognizer": (small, vocabulary), "wav2vec2 base": (large, labels(PIPELINE) or [])}
    found = {}
    for name, (model, symbols) in models.items():
        transcriber = Transcriber(model.to(options.device), symbols)
        found[name] = median(lambda t=transcriber: t(wave), options.rounds) / seconds
    greedy = Transcriber(small, vocabulary)
    log_probs = greedy.log_probs(wave).numpy()
    for beam in (8, 32, 100):
        decoder = BeamDecoder(beam=beam)
        found[f"beam {beam}"] = median(lambda d=decoder: d.best(log_probs, vocabulary), 2) / seconds
    return found


def training(options: Any) -> dict[str, float]:
    """A training step by LoRA on 4 utterances of 5 seconds."""
    model = pretrained_recognizer(PIPELINE, labels(PIPELINE), pretrained=False)
    task = SpeechRecognizer(model, labels(PIPELINE) or []).to(options.device)
    ll.inject(task, ll.LoRAConfig(rank=8))
    waves = torch.randn(4, 5 * SAMPLE_RATE, device=options.device)
    lengths = torch.full((4,), 5 * SAMPLE_RATE, device=options.device)

    def step() -> None:
        log_probs, frames = task(waves, lengths)
        targets = torch.ones(4, 30, dtype=torch.int64, device=options.device)
        counts = torch.full((4,), 30, device=options.device)
        torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), targets, frames, counts).backward()

    step()
    return {"wav2vec2 base, LoRA": median(step, options.rounds) / 20}


def loading(options: Any) -> dict[str, float]:
    """A batch of 12 utterances of 5 seconds, read in this process."""
    found = {}
    t = np.arange(5 * 44_100) / 44_100
    sound = (0.3 * np.sin(2 * np.pi * 220 * t) + 0.01 * np.random.default_rng(0).normal(size=len(t)))[:, None]
    everything = Augmentation(speed=[0.9, 1.1], noise_snr=[0, 15], noise_prob=1.0, gain_db=[-18, 6])
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("wav", "flac", "ogg", "mp3"):
            for rate in (16_000, 44_100):
                path = Path(folder) / f"{rate}.{suffix}"
                soundfile.write(path, sound[: 5 * rate], rate)
                for name, augment in (("", None), (", augmented", everything)):
                    if augment and suffix != "flac":
                        continue
                    rows = [Row(str(path), "one", str(i)) for i in range(12)]
                    batches = Batches([range(12)], Utterances(rows, [], augment))
                    key = f"{suffix} at {rate} Hz{name}"
                    found[key] = median(lambda b=batches: b[0], options.rounds) / 60
    return found


def median(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of this thread's process, the middle of several rounds; on a GPU seconds."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
