"""What compression costs the embedded models: accuracy and word error rate by the share of parameters, no
fine-tuning.

    python -m benchmarks.compression          writes benchmarks/results/compression.json
    python -m benchmarks.compression --table  what is there

By the inputs of 256 training images, of 120 validation utterances, or by the weights alone (`plain`); one
thread. Time is that of the compressed model for one input, relative to the dense one's in the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.measure import interleaved, ratios
from benchmarks.tune_digits import classifier
from lora_lightning.data.accents import VOCABULARY, AccentsDataModule
from lora_lightning.data.digits import DigitsDataModule, render
from lora_lightning.data.speech import SpeechBatch, collate
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.error_rates import Transcript, error_rate
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "compression.json"
SHARES = {"resnet_digits": (0.5, 0.35, 0.2, 0.15), "conformer_us": (0.7, 0.5, 0.35)}
ROUNDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        rows: list[dict[str, Any]] = []
        for task in (digits, accents):
            for row in measured(*task()):
                rows.append(row)
                RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["rows"]))


def digits() -> tuple[str, nn.Module, list[Any], Callable[[nn.Module], float], Any]:
    """The ResNet on upright digits: accuracy in percent of 597 test images."""
    data = DigitsDataModule("source")
    data.setup()
    images, labels = data.test_set.tensors
    torch.manual_seed(0)
    batch = render(data.train_set.tensors[0][:256], "source")

    def score(model: nn.Module) -> float:
        found: Tensor = model(images).argmax(1) == labels
        return 100 * found.float().mean().item()

    return "resnet_digits", classifier("resnet", 1e-3).model.eval(), [batch], score, (images[:1],)


def accents() -> tuple[str, nn.Module, list[Any], Callable[[nn.Module], float], Any]:
    """The Conformer on US English: word error rate in percent of 250 utterances of unseen speakers."""
    data = AccentsDataModule()
    data.setup()
    ours = [utterance for utterance in data.val_set if utterance.accent == "us"]
    given = [(b.waves, b.lengths) for b in (collate(ours[i : i + 16]) for i in range(0, len(ours), 16))]
    test = [utterance for utterance in data.test_set if utterance.accent == "us"]
    batches = [collate(test[i : i + 50]) for i in range(0, len(test), 50)]

    def score(model: nn.Module) -> float:
        return 100 * error_rate(list(heard(model, batches)))[0]

    model = conformer_ctc(VOCABULARY, checkpoint="conformer_us").eval()
    return "conformer_us", model, given, score, tuple(part[:1] for part in given[0])


def heard(model: nn.Module, batches: list[SpeechBatch]) -> Iterator[Transcript]:
    """What a model makes of utterances, beside what is said."""
    task = SpeechRecognizer(model, VOCABULARY).eval()
    for batch in batches:
        texts, _ = task.predict_and_loss(batch)
        for row in zip(batch.ids, batch.accents, batch.speakers, batch.texts, texts, strict=True):
            yield Transcript(*row)


@torch.no_grad()
def measured(
    name: str, model: nn.Module, data: list[Any], score: Callable[[nn.Module], float], one: Any
) -> Iterator[dict[str, Any]]:
    """A row of the dense model, then one of each share, by the inputs and by the weights alone."""
    yield {"model": name, "parameters": 1.0, "score": score(model)}
    for share in SHARES[name]:
        row: dict[str, Any] = {"model": name, "share": share}
        smaller, plain = copy.deepcopy(model), copy.deepcopy(model)
        told = ll.compress(smaller, parameters=share, data=data)
        ll.compress(plain, parameters=share, plain=True)
        row["parameters"] = told.parameters[1] / told.parameters[0]
        row |= {"score": score(smaller), "plain": score(plain)}
        if told.flops:
            row["flops"] = told.flops[1] / told.flops[0]
        times = interleaved({"dense": partial(model, *one), "smaller": partial(smaller, *one)}, ROUNDS)
        row["time"] = ratios(times, "dense")["smaller"]["ratio"]
        print(json.dumps(row), flush=True)
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/compression.md shows it."""
    cells = [
        (
            row["model"],
            f"{row['parameters']:.2f}",
            f"{row['flops']:.2f}" if "flops" in row else "",
            f"{row['time']:.2f}" if "time" in row else "",
            f"{row['score']:.1f}",
            f"{row['plain']:.1f}" if "plain" in row else "",
        )
        for row in rows
    ]
    return format_table(("model", "parameters", "FLOPs", "time", "score %", "plain %"), cells)


if __name__ == "__main__":
    main()
