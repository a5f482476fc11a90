"""What the formats of export make of the embedded models: bytes, the time of one input, how far they differ.

    python -m benchmarks.export          writes benchmarks/results/export.json, goes on where it was stopped
    python -m benchmarks.export --table  what is there

One input of one size, one thread. Times are of CPU, each relative to the eager model's of the same round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lightning as ll
from benchmarks.measure import interleaved, ratios
from benchmarks.tune_digits import classifier
from lora_lightning.data.accents import VOCABULARY
from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.exporting.subject import inputs_of
from lora_lightning.models.ctc import conformer_ctc
from lora_lightning.utils.libraries import LibraryError
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "export.json"
RUN = [name for name, form in FORMATS.items() if form.imports and not form.adapters]
ROUNDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        known = {(row["model"], row["format"]) for row in rows}
        for model, make in MODELS.items():
            for format in RUN:
                if (model, format) not in known:
                    rows.append({"model": model, "format": format, **measured(*make(), format)})
                    print(rows[-1], flush=True)
                    RESULTS.write_text(
                        json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n"
                    )
    print(table(rows))


def digits(name: str) -> tuple[nn.Module, Any]:
    """A classifier of digits and one picture."""
    torch.manual_seed(0)
    return classifier(name, 1e-3).model.eval(), torch.randn(1, 3, 16, 16)


def accents() -> tuple[nn.Module, Any]:
    """The Conformer and a second of sound."""
    torch.manual_seed(0)
    model = conformer_ctc(VOCABULARY, checkpoint="conformer_us").eval()
    return model, (0.1 * torch.randn(1, SAMPLE_RATE), torch.tensor([SAMPLE_RATE]))


@torch.no_grad()
def measured(model: nn.Module, example: Any, format: str) -> dict[str, Any]:
    """One row; what is missing where a format does not take the model, or its library is not here."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            told = ll.export(model, example, out, format=format, dynamic=False)
        except (ll.UserError, LibraryError) as error:
            return {"refused": str(error)}
        run = FORMATS[format].load(out, None)
        inputs = inputs_of(model, example)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        steps = {"eager": partial(model, **inputs), format: partial(run, arrays)}
        found = ratios(interleaved(steps, ROUNDS, clock=time.process_time), "eager")
    return {"bytes": told.bytes, "difference": told.difference, "eager": found["eager"], "own": found[format]}


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/export.md shows it."""
    cells = [
        (
            row["model"],
            row["format"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['own']['ms']:.2f}",
            f"{row['own']['ratio']:.2f} ({row['own']['low']:.2f}–{row['own']['high']:.2f})",
            f"{row['difference']:.0e}",
        )
        for row in rows
        if "refused" not in row
    ]
    return format_table(("model", "format", "MB", "ms", "of eager", "difference"), cells)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet_digits": partial(digits, "resnet"),
    "vit_digits": partial(digits, "vit"),
    "conformer_us": accents,
}

if __name__ == "__main__":
    main()
