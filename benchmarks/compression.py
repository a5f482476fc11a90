"""What compression costs the embedded models, accuracy and word error rate by the share of parameters without
fine-tuning, and how much faster large networks are.

    python -m benchmarks.compression          writes benchmarks/results/compression.json, goes on where it was
    python -m benchmarks.compression --table  what is there

By the inputs of 256 training images, of 120 validation utterances, or by the weights alone (`plain`); one
thread. Time is that of the compressed model for one input, relative to the dense one's in the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.compression_speed import speeds
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
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found = {"torch": torch.__version__, "rows": [], "speeds": []} | found
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        for part, rows in (
            ("rows", losses(_known(found["rows"]))),
            ("speeds", speeds(_known(found["speeds"]))),
        ):
            for row in rows:
                print(json.dumps(row), flush=True)
                found[part].append(row)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))
    for row in found["speeds"]:
        print(f"{row['model']} at {row['parameters']:.2f}: {row['faster']:.2f} times faster")


def _known(rows: list[dict[str, Any]]) -> set[tuple[str, float]]:
    return {(row["model"], row.get("share", 1.0)) for row in rows}


def losses(known: set[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """Rows of the embedded models that are not known."""
    for name, task in (("resnet_digits", digits), ("conformer_us", accents)):
        if missing := [share for share in (1.0, *SHARES[name]) if (name, share) not in known]:
            yield from measured(*task(), missing)


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
    name: str,
    model: nn.Module,
    data: list[Any],
    score: Callable[[nn.Module], float],
    one: Any,
    shares: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """A row of each share, 1 is the dense model's, by the inputs and by the weights alone."""
    for share in shares:
        if share == 1:
            yield {"model": name, "parameters": 1.0, "score": score(model)}
            continue
        row: dict[str, Any] = {"model": name, "share": share}
        smaller, plain = copy.deepcopy(model), copy.deepcopy(model)
        told = ll.compress(smaller, parameters=share, data=data)
        ll.compress(plain, parameters=share, plain=True)
        row["parameters"] = told.parameters[1] / told.parameters[0]
        row |= {"score": score(smaller), "plain": score(plain)}
        if told.flops:
            row["flops"] = told.flops[1] / told.flops[0]
        ways = {"dense": partial(model, *one), "smaller": partial(smaller, *one)}
        times = interleaved(ways, ROUNDS, clock=time.process_time)
        row["time"] = ratios(times, "dense")["smaller"]["ratio"]
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
