"""What a window of 10 seconds costs Whisper, and what it saves: `model.seconds=10` against 30, untrained; and
what a step costs on a CPU in the recipe's `bf16-mixed`.

python -m benchmarks.whisper_window        needs the files of benchmarks.whisper_files
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import lora_lightning as ll
from benchmarks.fits import quiet
from benchmarks.measure import interleaved, ratios, saved_bytes
from benchmarks.whisper_files import LANGUAGES, prepared
from lora_lightning.data.audio import read_audio
from lora_lightning.data.speech import SpeechBatch, Utterance, collate
from lora_lightning.data.text import normalize
from lora_lightning.errors import UserError
from lora_lightning.models.whisper import whisper
from lora_lightning.tasks.error_rates import Transcript, error_rate
from lora_lightning.tasks.seq2seq import Seq2SeqRecognizer

RESULTS = Path(__file__).parent / "results" / "whisper_window.json"
WINDOWS = (30, 10)
BATCH, ROUNDS, UTTERANCES = 4, 3, 40
LORA = ll.LoRAConfig(rank=16, modules_to_save=None)


def main() -> None:
    quiet()
    try:
        folder = prepared()
    except UserError as error:
        sys.exit(str(error))
    found: dict[str, Any] = {"torch": torch.__version__, "batch": BATCH}
    batch = read(folder / "czech.csv", "val")[0]
    steps = {f"{window} s": Step(recognizer(folder, "cs", window), batch) for window in WINDOWS}
    found["step"] = ratios(interleaved(steps, ROUNDS, clock=time.process_time), "30 s")
    found["saved_bytes"] = {name: saved_bytes(step.task, step.loss) for name, step in steps.items()}
    print(found["step"], found["saved_bytes"], flush=True)
    del steps
    found["precision"] = precisions(folder, batch)
    print(found["precision"], flush=True)
    for name, language in {"english": "en", **LANGUAGES}.items():
        batches = read(folder / f"{name}.csv", "test")[: UTTERANCES // BATCH]
        for window in WINDOWS:
            found[f"{name}, {window} s"] = heard(recognizer(folder, language, window), batches)
            print(name, window, found[f"{name}, {window} s"], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def precisions(folder: Path, batch: SpeechBatch) -> Any:
    """A step on 10 seconds, relative to float32's."""
    names = {"32-true": False, "bf16-mixed": True}
    steps = {name: Step(recognizer(folder, "cs", 10), batch, half) for name, half in names.items()}
    return ratios(interleaved(steps, ROUNDS, clock=time.process_time), "32-true")


def recognizer(folder: Path, language: str, window: int) -> Seq2SeqRecognizer:
    model = whisper(checkpoint=str(folder / "base"), language=language, seconds=window)
    return Seq2SeqRecognizer(model, ["<blank>", "a"]).eval()


def read(manifest: Path, part: str) -> list[SpeechBatch]:
    """Batches of a manifest's part, in its order."""
    with manifest.open(encoding="utf8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == part]
    heard = [
        Utterance(read_audio(row["path"]), normalize(row["text"]), row["path"], "", row["speaker"])
        for row in rows
    ]
    return [collate(heard[i : i + BATCH]) for i in range(0, len(heard), BATCH)]


@torch.no_grad()
def heard(task: Seq2SeqRecognizer, batches: list[SpeechBatch]) -> dict[str, float]:
    """Error rates in percent, and CPU seconds an utterance."""
    transcripts, start = [], time.process_time()
    for batch in batches:
        texts = task.transcribe(batch.waves, batch.lengths)
        rows = zip(batch.ids, batch.accents, batch.speakers, batch.texts, texts, strict=True)
        transcripts += [Transcript(*row) for row in rows]
    seconds = (time.process_time() - start) / len(transcripts)
    rates = {unit: 100 * error_rate(transcripts, unit).rate for unit in ("word", "character")}
    return {**rates, "seconds": seconds, "utterances": len(transcripts)}


class Step:
    """A step of LoRA's training."""

    def __init__(self, task: Seq2SeqRecognizer, batch: SpeechBatch, half: bool = False) -> None:
        self.task, self.batch, self.half = task.train(), batch, half
        ll.inject(task, LORA)
        self.optimizer = torch.optim.AdamW(ll.lora_parameters(task))

    def loss(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return self.task.batch_loss(self.batch)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
