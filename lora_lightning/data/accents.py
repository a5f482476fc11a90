"""AccentsDataModule: a corpus of `espeak_corpus`, the embedded one or another, accent by accent."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import soundfile
import torch
from torch.utils.data import DataLoader, Sampler

from lora_lightning.data.options import BatchSize, Count, Folder, Seed
from lora_lightning.data.speech import SAMPLE_RATE, Utterance, collate
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError, did_you_mean
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import problems
from lora_lightning.utils.marks import TEXT, listed

EMBEDDED = Path(__file__).parent / "accents"
VOCABULARY = ["_", " ", "'", *"abcdefghijklmnopqrstuvwxyz"]
EVAL_BATCH_SIZE = 64


class AccentsDataModule(L.LightningDataModule):
    """Synthetic speech in several accents, split by speaker and by sentence.

    Batches are `SpeechBatch`. The embedded corpus has US, Scottish and Caribbean English; its US English
    has no training part.

    Args:
        accent: which to train, validate and test on; one or a list.
        kept: accents that are validated and tested beside it.
        train_size: how many training utterances are used, the first ones of each accent; None takes all.
        batch_size: training utterances a batch.
        root: a folder that `python -m lora_lightning.data.espeak_corpus` has made; None takes the
            embedded corpus.
        seed: the order of the training utterances.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: `root` is no such folder.
    """

    def __init__(
        self,
        accent: Annotated[
            str | Sequence[str], listed("an accent, or a list of them", TEXT, alone=True)
        ] = "scottish",
        kept: Annotated[Sequence[str], listed("a list of accents", TEXT, least=0)] = ("us",),
        train_size: Count | None = None,
        batch_size: BatchSize = 16,
        root: Folder | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        bad = problems(AccentsDataModule, locals())
        if not any(problem.startswith(("accent=", "kept=", "root=")) for problem in bad):
            self.accents = [accent] if isinstance(accent, str) else list(accent)
            self.kept = [a for a in kept if a not in self.accents]
            self.root = EMBEDDED if root is None else Path(root)
            bad = [*_not_in_corpus(self.root, self.accents, self.kept), *bad]
        if bad:
            raise ConfigError(bad)
        self.save_hyperparameters()
        self.train_size, self.batch_size, self.seed = train_size, batch_size, seed
        self.provides: dict[str, Any] = {"vocabulary": VOCABULARY, "kept": self.kept}

    def setup(self, stage: str | None = None) -> None:
        self.train_set = [
            u for a in self.accents for u in utterances(self.root, a, "train")[: self.train_size]
        ]
        self.val_set = [u for a in [*self.accents, *self.kept] for u in utterances(self.root, a, "val")]
        self.test_set = [u for a in [*self.accents, *self.kept] for u in utterances(self.root, a, "test")]

    def train_dataloader(self) -> DataLoader:
        sampler = SimilarLengths([len(u.wave) for u in self.train_set], self.batch_size)
        return ResumableLoader(
            self.train_set,  # type: ignore[arg-type]  # torch takes a list
            self.batch_size,
            sampler=sampler,
            seed=self.seed,
            collate_fn=collate,
        )

    def val_dataloader(self) -> DataLoader:
        return _in_order(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return _in_order(self.test_set)


def _in_order(utterances: Any) -> DataLoader:
    """A loader of a list, for evaluation."""
    return DataLoader(utterances, EVAL_BATCH_SIZE, collate_fn=collate)


def _not_in_corpus(root: Path, accents: Sequence[str], kept: Sequence[str]) -> list[str]:
    """One line for each accent that a corpus does not have, or has no training part of."""
    rows = manifest(root)
    found = list(dict.fromkeys(row["accent"] for row in rows))
    trained = {row["accent"] for row in rows if row["split"] == "train"}
    absent = [
        f"{name}={given}: {root.name} has {', '.join(found)}.{did_you_mean(given, found)}"
        for name, values in (("accent", accents), ("kept", kept))
        for given in values
        if given not in found
    ]
    untrained = [
        f"accent={given}: {root.name} has no training part of it; make one by python -m"
        f" lora_lightning.data.espeak_corpus FOLDER --accents {given} --tested; give data.root=FOLDER."
        for given in accents
        if given in found and given not in trained
    ]
    return absent + untrained


class SimilarLengths(Sampler[int]):
    """Random order in which each batch's utterances are of similar length, so that little is padding.

    Draws from torch's global generator, which ResumableLoader seeds.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths, self.batch_size = torch.tensor(lengths, dtype=torch.float), batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        jitter = 0.2 * self.lengths.std(unbiased=False) * torch.randn(len(self.lengths))
        batches = list((self.lengths + jitter).argsort().split(self.batch_size))
        for index in torch.randperm(len(batches)).tolist():
            yield from batches[index].tolist()


def manifest(root: Path) -> list[dict[str, str]]:
    """The rows of a corpus's manifest.

    Raises:
        MissingFileError: there is none.
    """
    path = root / "manifest.tsv"
    if not path.is_file():
        raise MissingFileError(
            f"root={root}: there is no manifest.tsv. Make the corpus: python -m"
            f" lora_lightning.data.espeak_corpus {root} (its --help lists accents and sizes)."
        )
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@functools.lru_cache(maxsize=32)
def utterances(root: Path, accent: str, split: str) -> list[Utterance]:
    """A part of a corpus, decoded once a process.

    Raises:
        AdapterFileError: the audio is not what the corpus was made with.
    """
    rows = [r for r in manifest(root) if (r["accent"], r["split"]) == (accent, split)]
    waves = {name: _read(root, name) for name in {row["path"] for row in rows}}
    return [
        Utterance(
            waves[r["path"]][_sample(r["start"]) : _sample(r["end"])],
            r["text"],
            r["id"],
            accent,
            r["speaker"],
        )
        for r in rows
    ]


def _sample(seconds: str) -> int:
    return round(float(seconds) * SAMPLE_RATE)


def _read(root: Path, name: str) -> torch.Tensor:
    path = root / name
    expected = json.loads((root / "corpus.json").read_text())["sha256"].get(name)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise AdapterFileError(
            f"{path} is missing or not the file that {root / 'corpus.json'} describes: make the corpus anew."
        )
    wave, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE, rate
    return torch.from_numpy(wave)
