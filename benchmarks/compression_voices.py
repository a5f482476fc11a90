"""Resemblyzer's speaker encoder, 3 × 256, compressed to half of its parameters and distilled on recordings:
its embeddings against its own as it was. `benchmarks.compression_recurrent --voices` runs it.

The weights are got as `HOW` says, the recordings as `benchmarks.whisper_files` says.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning as ll
from benchmarks.measure import interleaved, ratios
from benchmarks.real_files import FOLDER, require_files
from benchmarks.whisper_files import prepared
from lora_lightning.data.accents import EMBEDDED, utterances
from lora_lightning.data.audio import read_audio
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.progress import working

FRAMES, EARLIEST = 160, 80  # of a part of a recording; where it may end for distillation
SEEN, TESTED = 256, 400  # parts: by which is compressed; of a set that is tested
STEPS, RATE, BATCH = 2700, 1e-3, 16  # of distillation
KEEP = 50  # steps after which it is kept where distillation stands
SPEEDS = {1: 20, 16: 5}  # parts at once -> rounds
WEIGHTS = "resemblyzer/pretrained.pt"
DIGESTS = {WEIGHTS: "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"}
HOW = """Get it, outside of the repository, and say where with LORA_LIGHTNING_REAL=FOLDER:
  mkdir -p FOLDER && cd FOLDER
  pip download --no-deps Resemblyzer==0.1.4
  python -m zipfile -e Resemblyzer*.whl ."""


class Speaker(nn.Module):
    """Resemblyzer's encoder, by its names: parts of utterances (batch, frames, 40) to unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.embedded(hidden[-1])

    def steps(self, x: Tensor) -> Tensor:
        """As if the parts ended earlier, too: the last of the ends is theirs."""
        return self.embedded(self.lstm(x)[0][:, EARLIEST - 1 :: 8])  # (batch, ends, 256)

    def embedded(self, hidden: Tensor) -> Tensor:
        return nn.functional.normalize(self.linear(hidden).relu(), dim=-1)


def voices() -> Iterator[dict[str, Any]]:
    """The one row: by sets of recordings the cosine to the dense model's embeddings, mean and 5th percentile,
    before and after distillation, and of the dense model in fewer bits; how many times faster, by parts at
    once."""
    require_files(FOLDER, DIGESTS, HOW)
    dense = Speaker().eval()
    known = torch.load(FOLDER / WEIGHTS, "cpu", weights_only=True)["model_state"]
    dense.load_state_dict({n: t for n, t in known.items() if not n.startswith("similarity")})
    train, tests = Parts(trained_on()), {name: Parts(waves).spread(TESTED) for name, waves in tested_on()}
    tests = {"trained on": train.spread(TESTED)} | tests
    model = copy.deepcopy(dense)
    told = ll.compress(model, parameters=0.5, data=[*train.spread(SEEN).split(BATCH)])
    before, after = told.parameters
    row: dict[str, Any] = {"share": after / before, "rank": told.layers[0].rank[0], "steps": STEPS}
    row["parts"] = {name: len(parts) for name, parts in tests.items()} | {"trained on": len(train.starts)}
    row["bits"] = {
        way: {name: cosine(dense, other, parts) for name, parts in tests.items()}
        for way, other in in_fewer_bits(dense).items()
    }
    row["before"] = {name: cosine(dense, model, parts) for name, parts in tests.items()}
    print(json.dumps(row), flush=True)
    kept = FOLDER / f"compression_voices_{STEPS}_{RATE}_{BATCH}.pt"
    distil(dense, model, train, kept)
    row["after"] = {name: cosine(dense, model, parts) for name, parts in tests.items()}
    for batch, rounds in SPEEDS.items():
        x = train.spread(batch)
        ways = {"dense": partial(embeddings, dense, x), "smaller": partial(embeddings, model, x)}
        row[f"faster at {batch}"] = 1 / ratios(interleaved(ways, rounds), "dense")["smaller"]["ratio"]
    print(json.dumps(row), flush=True)
    yield row


class Parts:
    """Every part of `FRAMES` frames of some recordings, as Resemblyzer hears them: what is below -30 dB of
    full scale is made as loud, and what is too short goes on in zeros; its search for silence is left out.

    Args:
        waves: at 16 kHz, one recording each.
    """

    def __init__(self, waves: Iterable[Tensor]) -> None:
        import torchaudio

        mel = torchaudio.transforms.MelSpectrogram(
            16000, 400, hop_length=160, n_mels=40, norm="slaney", mel_scale="slaney", pad_mode="constant"
        )
        every, starts, end = [], [], 0
        for wave in waves:
            loud = 10 ** (-30 / 20) / wave.square().mean().sqrt()
            frames = mel(wave * loud.clamp(min=1)).T
            frames = nn.functional.pad(frames, (0, 0, 0, max(0, FRAMES - len(frames))))
            every.append(frames)
            starts.append(end + torch.arange(len(frames) - FRAMES + 1))
            end += len(frames)
        self.frames, self.starts = torch.cat(every), torch.cat(starts)

    def at(self, index: Tensor) -> Tensor:
        """These parts, (parts, frames, 40)."""
        return self.frames[self.starts[index][:, None] + torch.arange(FRAMES)]

    def spread(self, count: int) -> Tensor:
        """So many, evenly over all."""
        return self.at(torch.linspace(0, len(self.starts) - 1, count).long())


def trained_on() -> Iterator[Tensor]:
    """Czech dialogue, the test levels left out, half of the prompts, and synthetic validation speakers."""
    yield from recordings("czech", "train", "val")
    yield from [*recordings("english", "test")][::2]
    yield from synthetic("val")


def tested_on() -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Sets by name: of the last two no voice was trained on."""
    yield "Czech, other levels", recordings("czech", "test")
    yield "English, other prompts", [*recordings("english", "test")][1::2]
    yield "Dutch, other voices", recordings("dutch", "test")
    yield "synthetic, other voices", synthetic("test")


def recordings(language: str, *splits: str) -> Iterator[Tensor]:
    """Of a manifest that `benchmarks.whisper_files` writes."""
    with open(prepared() / f"{language}.csv", encoding="utf8") as file:
        for row in csv.DictReader(file):
            if row["split"] in splits:
                yield read_audio(row["path"])


def synthetic(split: str) -> Iterator[Tensor]:
    """Of the corpus that is embedded in the package."""
    for accent in ("us", "scottish", "caribbean"):
        yield from (utterance.wave for utterance in utterances(EMBEDDED, accent, split))


def in_fewer_bits(dense: Speaker) -> dict[str, nn.Module]:
    """The same network with numbers of 16 bits, and with torch's dynamic int8."""
    int8 = torch.ao.quantization.quantize_dynamic(dense, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    return {"float16": copy.deepcopy(dense).half(), "bfloat16": copy.deepcopy(dense).bfloat16(), "int8": int8}


@torch.inference_mode()
def embeddings(model: nn.Module, x: Tensor) -> Tensor:
    """Of parts, (parts, 256), computed in the model's own precision."""
    like = next((p.dtype for p in model.parameters()), x.dtype)
    return torch.cat([model(some.to(like)).to(x.dtype) for some in x.split(64)])


def cosine(dense: nn.Module, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of the embeddings of one with those of the other: mean and 5th percentile."""
    found = nn.functional.cosine_similarity(embeddings(dense, x), embeddings(model, x))
    return found.mean().item(), found.quantile(0.05).item()


def distil(dense: Speaker, model: Speaker, train: Parts, kept: Path) -> None:
    """Train a model to the other's embeddings, at several ends of every part, whose loudness and tilt are
    varied, as voices and microphones do.

    Args:
        kept: where it stands now and then; from there a stopped run goes on.
    """
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    drawn = torch.Generator().manual_seed(0)
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        drawn.set_state(state["drawn"])
    for _ in working(range(schedule.last_epoch, STEPS), "distilling", "steps"):
        x = train.at(torch.randint(len(train.starts), (BATCH,), generator=drawn))
        loudness, tilt = torch.randn(2, BATCH, 1, 1, generator=drawn) / 2
        x = x * (loudness + tilt * torch.linspace(-1, 1, x.shape[-1])).exp()
        with torch.no_grad():
            aims = dense.steps(x)
        loss = (1 - (model.steps(x) * aims).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if schedule.last_epoch % KEEP == 0:
            state = {"model": model, "optimizer": optimizer, "schedule": schedule}
            states = {name: part.state_dict() for name, part in state.items()}
            write_whole(kept, partial(torch.save, states | {"drawn": drawn.get_state()}))


def cells_of_voices(row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: of each set mean and 5th percentile."""
    cells = [
        [name, *(f"{value:.3f}" for when in ("before", "after") for value in row[when][name])]
        for name in row["after"]
    ]
    return ["cosine", "compressed", "5th percentile", "distilled", "5th percentile"], cells


def cells_of_bits(row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The same of the dense network in fewer bits."""
    header = ["cosine", *(head for way in row["bits"] for head in (way, "5th percentile"))]
    cells = [
        [name, *(f"{value:.3f}" for found in row["bits"].values() for value in found[name])]
        for name in row["after"]
    ]
    return header, cells
