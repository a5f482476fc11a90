"""What compression does to LSTMs: time of 5 × 512 by the share of its parameters, beside int8 and bfloat16;
and a real speaker encoder, 3 × 256, against its own embeddings.

    python -m benchmarks.compression_recurrent           all, into benchmarks/results
    python -m benchmarks.compression_recurrent --speed   the first alone; or --int8, --voices
    python -m benchmarks.compression_recurrent --table   what is there

One thread; every round runs every model once, and a number is the median over the rounds of the dense model's
time by a model's: above 1 is faster. Of int8 the dense model is torch's, beside files of onnxruntime, in the
processor's time. Voices are the embedded corpus': validation speakers as data and to distil, other speakers
to test. The encoder's weights are `Resemblyzer`'s, which is got as `HOW` says.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.measure import interleaved, machine, ratios
from benchmarks.real_files import FOLDER, require_files
from lora_lightning.data.accents import EMBEDDED, utterances
from lora_lightning.data.speech import Utterance
from lora_lightning.exporting.onnx import load
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import format_table

RESULTS = Path(__file__).parent / "results" / "compression_recurrent.json"
SHAPES = {(1, 10): 30, (16, 200): 5, (1, 200): 10}  # (batch, frames) -> rounds
INT8_SHAPES = {(1, 10): 30, (16, 200): 3, (1, 200): 7}
SHARES = {"1/2": 1 / 2, "1/3": 1 / 3}
VOICES = (0.7, 0.5)
STEPS, RATE, BATCH = 300, 1e-3, 16  # of distillation
FRAMES, HOP = 160, 80  # of a part of an utterance, and between two
WEIGHTS = "resemblyzer/pretrained.pt"
DIGESTS = {WEIGHTS: "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"}
HOW = """Get it, outside of the repository, and say where with LORA_LIGHTNING_REAL=FOLDER:
  mkdir -p FOLDER && cd FOLDER
  pip download --no-deps Resemblyzer==0.1.4
  python -m zipfile -e Resemblyzer*.whl ."""


class Encoder(nn.Module):
    """An LSTM and a linear layer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(512, 512, 5, batch_first=True), nn.Linear(512, 29)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(x)[0])
        return found


class Speaker(nn.Module):
    """Resemblyzer's encoder, by its names: parts of utterances (batch, frames, 40) to unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts: dict[str, Callable[[], Iterator[Any]]] = {"speed": speed, "int8": int8_files, "voices": voices}
    for name in ("table", *parts):
        parser.add_argument(f"--{name}", action="store_true")
    asked = vars(parser.parse_args())
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not asked["table"]:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="LSTM with projections")
        parts = {name: rows for name, rows in parts.items() if asked[name]} or parts
        if "voices" in parts:
            require_files(FOLDER, DIGESTS, HOW)
        found |= machine(1, "cpu")
        for name, rows in parts.items():
            found[name] = []
            for row in rows():
                found[name].append(row)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))
    print(table(found))


def int8(model: nn.Module) -> nn.Module:
    """Weights of recurrent and linear layers in 8 bits, inputs quantized as they come."""
    kinds = {nn.LSTM, nn.Linear}
    smaller: nn.Module = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    return smaller


def speed() -> Iterator[dict[str, Any]]:
    """Of every shape of the input a row."""
    torch.manual_seed(0)
    dense = Encoder().eval()
    models: dict[str, nn.Module] = {"dense": dense}
    for name, share in SHARES.items():
        models[name] = copy.deepcopy(dense)
        ll.compress(models[name], parameters=share, data=[torch.randn(1, 8, 512)], plain=True)
    models |= {f"{name}, bfloat16": copy.deepcopy(m).bfloat16() for name, m in [*models.items()]}
    models |= {"dense, int8": int8(dense), "1/3, int8": int8(models["1/3"])}
    for (batch, frames), rounds in SHAPES.items():
        x = torch.randn(batch, frames, 512)
        steps, failed = {}, {}
        for name, model in models.items():
            given = x.bfloat16() if "bfloat16" in name else x
            try:
                with torch.inference_mode():
                    model(given)
                steps[name] = partial(_run, model, given)
            except RuntimeError as error:
                failed[name] = str(error).splitlines()[0]
        times = ratios(interleaved(steps, rounds), "dense")
        row = {"batch": batch, "frames": frames, "ms": times["dense"]["ms"], "failed": failed}
        row["faster"] = {name: 1 / about["ratio"] for name, about in times.items()}
        print(json.dumps(row), flush=True)
        yield row


def int8_files() -> Iterator[dict[str, Any]]:
    """Of every shape of the input a row: int8 files that `export` writes, beside torch's int8 of the dense
    model."""
    torch.manual_seed(0)
    dense = Encoder().eval()
    models = {"1": dense} | {name: copy.deepcopy(dense) for name in SHARES}
    steps: dict[str, Callable[..., Any]] = {"torch": partial(_run, int8(dense))}
    axes, megabytes = {"x": {0: "batch", 1: "frames"}}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model) in enumerate(models.items()):
            if name in SHARES:
                ll.compress(model, parameters=SHARES[name], data=[torch.randn(1, 8, 512)], plain=True)
            out = Path(folder) / str(number)
            told = ll.export(model, torch.randn(2, 9, 512), out, dynamic=axes, quantize="dynamic")
            steps[name], megabytes[name] = partial(_run_file, load(out)), told.bytes / 1e6
    for (batch, frames), rounds in INT8_SHAPES.items():
        x = torch.randn(batch, frames, 512)
        ways = {name: partial(step, x) for name, step in steps.items()}
        times = ratios(interleaved(ways, rounds, 1, clock=time.process_time), "torch")
        row = {"batch": batch, "frames": frames, "ms": times["torch"]["ms"], "megabytes": megabytes}
        row["faster"] = {name: 1 / about["ratio"] for name, about in times.items()}
        print(json.dumps(row), flush=True)
        yield row


def _run_file(run: Callable[[dict[str, Any]], Any], x: Tensor) -> Any:
    return run({"x": x.numpy()})


@torch.inference_mode()
def _run(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


def voices() -> Iterator[dict[str, Any]]:
    """Of every share of the parameters the cosine to the dense model's embeddings, mean and least, before and
    after distillation, and the time."""
    dense = Speaker().eval()
    known = torch.load(FOLDER / WEIGHTS, "cpu", weights_only=True)["model_state"]
    dense.load_state_dict({n: t for n, t in known.items() if not n.startswith("similarity")})
    accents = ("us", "scottish", "caribbean")
    train = parts_of([u for accent in accents for u in utterances(EMBEDDED, accent, "val")])
    test = parts_of([u for accent in accents for u in utterances(EMBEDDED, accent, "test")][::3])
    for share in VOICES:
        for plain in (True, False):
            model = copy.deepcopy(dense)
            told = ll.compress(model, parameters=share, data=[train[::8]], plain=plain)
            row: dict[str, Any] = {"share": told.parameters[1] / told.parameters[0], "plain": plain}
            row |= {"rank": told.layers[0].rank[0], "before": cosine(dense, model, test)}
            if not plain:
                distil(dense, model, train)
                row["after"] = cosine(dense, model, test)
                one = {"dense": partial(_run, dense, test[:1]), "smaller": partial(_run, model, test[:1])}
                row["faster"] = 1 / ratios(interleaved(one, 20), "dense")["smaller"]["ratio"]
            print(json.dumps(row), flush=True)
            yield row


def parts_of(found: list[Utterance]) -> Tensor:
    """Parts of utterances as Resemblyzer hears them, (parts, frames, 40): what is below -30 dB of full
    scale is made as loud; its search for silence is left out."""
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(
        16000, 400, hop_length=160, n_mels=40, norm="slaney", mel_scale="slaney", pad_mode="constant"
    )
    parts = []
    for utterance in found:
        loud = 10 ** (-30 / 20) / utterance.wave.square().mean().sqrt()
        frames = mel(utterance.wave * loud.clamp(min=1)).T
        frames = nn.functional.pad(frames, (0, 0, 0, max(0, FRAMES - len(frames))))
        parts += [frames[i : i + FRAMES] for i in range(0, len(frames) - FRAMES + 1, HOP)]
    return torch.stack(parts)


@torch.inference_mode()
def cosine(dense: nn.Module, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of the embeddings of one with those of the other: mean and least."""
    found = torch.cat([(dense(part) * model(part)).sum(1) for part in x.split(64)])
    return found.mean().item(), found.min().item()


def distil(dense: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Train a model to the other's embeddings."""
    with torch.no_grad():
        aims = torch.cat([dense(part) for part in x.split(64)])
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    drawn = torch.Generator().manual_seed(0)
    for _ in working(range(STEPS), "distilling", "steps"):
        index = torch.randint(len(x), (BATCH,), generator=drawn)
        loss = (1 - (model(x[index]) * aims[index]).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def table(found: dict[str, Any]) -> str:
    """As docs/compression.md shows it."""
    texts = []
    if rows := found.get("speed"):
        names = list(dict.fromkeys(n for row in rows for n in [*row["faster"], *row["failed"]]))
        header = ["", *(f"{row['batch']} × {row['frames']} frames" for row in rows)]
        cells = [[n, *(_faster(row, n) for row in rows)] for n in names]
        texts.append(format_table(header, cells))
    if rows := found.get("int8"):
        header = ["int8", "MB", *(f"{row['batch']} × {row['frames']} frames" for row in rows)]
        sizes = rows[0]["megabytes"]
        cells = [
            [n, f"{sizes[n]:.1f}" if n in sizes else "", *(_faster(row, n) for row in rows)]
            for n in rows[0]["faster"]
        ]
        texts.append(format_table(header, cells))
    if rows := found.get("voices"):
        cells = []
        for row in rows:
            after = "{:.3f} / {:.3f}".format(*row["after"]) if "after" in row else ""
            how, faster = "weights" if row["plain"] else "data", row.get("faster")
            before = "{:.3f} / {:.3f}".format(*row["before"])
            time = f"{faster:.2f}" if faster else ""
            cells.append([f"{row['share']:.2f}", str(row["rank"]), how, before, after, time])
        texts.append(format_table(["parameters", "rank", "by", "cosine", "distilled", "faster"], cells))
    return "\n\n".join(texts) + "\n"


def _faster(row: dict[str, Any], name: str) -> str:
    return f"{row['faster'][name]:.2f}" if name in row["faster"] else "fails"


if __name__ == "__main__":
    main()
