"""RecordingsDataModule: any manifest or corpus of speech, checked, split, bucketed and augmented."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from lora_lightning.data.audio import read_audio
from lora_lightning.data.buckets import Batches, bucketed
from lora_lightning.data.corpora import CORPORA, read_corpus
from lora_lightning.data.manifests import SPLIT_BY, Row, read_manifest, split_rows, with_accent
from lora_lightning.data.options import Folder, Seed, Workers
from lora_lightning.data.pipelines import PIPELINES, labels, pipeline_name
from lora_lightning.data.speech import SpeechBatch, Utterance
from lora_lightning.data.speech_augment import Augmentation
from lora_lightning.data.speech_check import Finding, Limits, cache_file, check, findings_table
from lora_lightning.data.text import normalize, vocabulary_of
from lora_lightning.data.workers import loading_workers
from lora_lightning.errors import UserError
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import fields_of, require
from lora_lightning.utils.marks import TEXT, Check, Null, above, is_number, listed, one_of, path

MANIFEST = "manifest"
PART = above(0, below=0.5, noun="a share")
TEST_PART = Check(
    "a share above 0 and below 0.5, or 1 for all", lambda v: is_number(v) and (v == 1 or PART.test(v))
)
VOCABULARY = Check(
    "a pipeline of torchaudio, a list of characters with the blank first",
    lambda v: pipeline_name(v) in PIPELINES if isinstance(v, str) else isinstance(v, Sequence),
    tuple(PIPELINES),
)
TOLD: set[str] = set()  # what a process has said already: the jobs of a comparison share their data


class RecordingsDataModule(L.LightningDataModule):
    """Recordings with transcripts, from a manifest or a corpus that lies on this machine.

    Before training every utterance is decoded once (`lora_lightning.data.speech_check`); what that pass
    heard is kept in a cache, so that the next run begins at once. Batches are `SpeechBatch`, of utterances
    of like length, and never cost more than `batch_seconds`.

    Args:
        corpus: "manifest", or one of `lora_lightning.data.corpora.CORPORA`.
        manifest: with corpus=manifest, a CSV, TSV or JSONL file.
        root: with another corpus, its folder.
        subsets: tables of Common Voice or folders of LibriSpeech; None takes the usual ones.
        accent: use only utterances of this accent or of one of these; None takes all.
        split_by: what training, validation and test never share: "speaker", "text", "utterance", or
            several of them. Counts where the corpus has no split of its own; where the rows name no
            speakers, "text" takes the place of "speaker", and a line says so.
        val_share: share of the utterances for validation.
        test_share: share for testing; 1 tests on all that the manifest does not give to other parts.
        train_minutes: use only so many minutes of the training part, drawn by `seed`; None takes all.
        vocabulary: the recognizer's outputs: the name of a torchaudio pipeline takes its labels; a list,
            blank first; None, or a pipeline without labels, takes the characters of the texts.
        batch_seconds: the budget of a batch and process, padding counted.
        min_seconds: shortest utterance.
        max_seconds: longest one.
        strict: end with a table of what cannot be used; False prints it and leaves that out.
        num_workers: loading processes; None takes the cores of this process, at most 8.
        seed: of the split and of everything random in the training batches.
        augment: `Augmentation` of the training utterances, or its options; None for none.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: data that are not on this machine: what to download, where to put it.
        UserError: with strict, the table of utterances that cannot be used.
    """

    def __init__(
        self,
        corpus: Annotated[str, one_of(MANIFEST, *CORPORA)] = MANIFEST,
        manifest: Annotated[str | None, path("a CSV, TSV or JSONL file")] = None,
        root: Folder | None = None,
        subsets: Annotated[Sequence[str] | None, listed("a list of tables or folders", TEXT)] = None,
        accent: Annotated[
            str | Sequence[str] | None, listed("an accent, or a list of them", TEXT, least=0, alone=True)
        ] = None,
        split_by: Annotated[str | Sequence[str], one_of(*SPLIT_BY, several=True)] = "speaker",
        val_share: Annotated[float, PART] = 0.1,
        test_share: Annotated[float, TEST_PART] = 0.1,
        train_minutes: Annotated[float | None, above(0)] = None,
        vocabulary: Annotated[str | Sequence[str] | None, VOCABULARY, Null("those of the texts")] = None,
        batch_seconds: Annotated[float, above(0)] = 60.0,
        min_seconds: Annotated[float, above(0)] = 0.3,
        max_seconds: Annotated[float, above(0)] = 20.0,
        strict: bool = True,
        num_workers: Workers = None,
        seed: Seed = 0,
        augment: Annotated[Augmentation | Mapping[str, Any] | None, fields_of(Augmentation)] = None,
    ) -> None:
        super().__init__()
        vocabulary = pipeline_name(vocabulary)
        require(RecordingsDataModule, locals(), _apart(corpus, manifest, root, min_seconds, max_seconds))
        by = [split_by] if isinstance(split_by, str) else list(split_by)
        self.corpus, self.manifest, self.root, self.subsets = corpus, manifest, root, subsets
        self.accents = [accent] if isinstance(accent, str) else list(accent or [])
        self.split_by, self.val_share, self.test_share = by, val_share, test_share
        self.train_minutes = train_minutes
        self.asked_vocabulary = vocabulary
        self.batch_seconds, self.limits = batch_seconds, Limits(min_seconds, max_seconds)
        self.strict, self.num_workers, self.seed = strict, num_workers, seed
        self.augment = Augmentation(**augment) if isinstance(augment, Mapping) else augment
        self.parts: dict[str, dict[Row, float]] = {}

    @property
    def provides(self) -> dict[str, Any]:
        """The vocabulary; nothing while there are no data, which `prepare_data` reports."""
        try:
            return {"vocabulary": self.vocabulary}
        except UserError:
            return {}

    @cached_property
    def vocabulary(self) -> list[str]:
        """What the recognizer can write: the blank, then characters."""
        asked = self.asked_vocabulary
        if isinstance(asked, str) and labels(asked) is not None:
            return labels(asked) or []
        if asked is not None and not isinstance(asked, str):
            return list(asked)
        return vocabulary_of(normalize(row.text) for row in self.rows)

    @cached_property
    def rows(self) -> list[Row]:
        """Every row of the source with the accents asked for, as it is written there."""
        if self.corpus == MANIFEST:
            rows = read_manifest(str(self.manifest))
        else:
            rows = read_corpus(self.corpus, str(self.root), self.subsets)
        return with_accent(rows, self.accents) if self.accents else rows

    def prepare_data(self) -> None:
        good, found = self._checked()
        if found:
            self._tell_findings(found)
        self._split(good)  # what cannot be split is an error now, before a model is built

    def _tell_findings(self, found: Sequence[Finding]) -> None:
        table = f"{len(found)} of {len(self.rows)} utterances cannot be used:\n{findings_table(found)}"
        if self.strict:
            raise UserError(f"{table}\nMend them or take them out, or give strict=false to leave them out.")
        _tell(f"{table}\nThey are left out (strict=false).\n")

    def _split(self, good: Mapping[Row, float]) -> dict[str, list[Row]]:
        if not good:
            raise UserError(
                f"none of {len(self.rows)} utterances can be used: give strict=true, which shows why."
            )
        if self.test_share == 1:
            return {"train": [], "val": [], "test": [row for row in good if row.split in ("", "test")]}
        by = self.split_by
        if "speaker" in by and not any(row.speaker for row in good) and not all(row.split for row in good):
            by = [field for field in by if field != "speaker"] or ["text"]
            _tell(
                f"data.split_by={','.join(self.split_by)}: the rows of {self.manifest or self.root} name no"
                f" speakers; they are split by {' and '.join(by)} instead."
            )
        parts, crossing = split_rows(list(good), by, self.val_share, self.test_share, self.seed)
        if crossing:
            _tell(_crossing(crossing, len(good), by))
        return parts

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        good, _ = self._checked()
        parts = self._split(good)
        if self.train_minutes is not None:
            parts["train"] = _drawn(parts["train"], good, 60 * self.train_minutes, self.seed)
        self.parts = {part: {row: good[row] for row in rows} for part, rows in parts.items()}

    def _checked(self) -> tuple[dict[Row, float], list[Finding]]:
        name = f"{self.corpus} {self.manifest or self.root} {self.accents}"
        return check(self.rows, self.vocabulary, self.limits, cache_file(name))

    @property
    def test_set(self) -> Utterances:
        """The test utterances, for a report; each is read when it is asked for."""
        return Utterances(list(self.parts["test"]), self.vocabulary)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", ResumableLoader, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, part: str, make: Any = DataLoader, **options: Any) -> DataLoader:
        training = part == "train"
        rows = list(self.parts[part])
        seconds = list(self.parts[part].values())
        longest = self.augment.longest() if training and self.augment else 1.0
        batches = bucketed(seconds, self.batch_seconds / longest, self.seed if training else None)
        most = self.limits.most
        workers = loading_workers(self.num_workers, self.trainer)
        return make(
            Batches(batches, Utterances(rows, self.vocabulary, self.augment if training else None, most)),
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            **options,
        )

    def transfer_batch_to_device(
        self, batch: SpeechBatch, device: torch.device, dataloader_idx: int
    ) -> SpeechBatch:
        return batch._replace(
            waves=batch.waves.to(device, non_blocking=True), lengths=batch.lengths.to(device)
        )


class Utterances(Sequence[Utterance]):
    """Rows as utterances, each read and augmented when it is asked for, to no more than `most` seconds."""

    def __init__(
        self,
        rows: Sequence[Row],
        vocabulary: Sequence[str],
        augment: Augmentation | None = None,
        most: float = math.inf,
    ) -> None:
        self.rows, self.vocabulary, self.augment, self.most = rows, vocabulary, augment, most

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        """Of each utterance."""
        return [row.id for row in self.rows]

    def __getitem__(self, index: Any) -> Any:
        """An utterance, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        wave = read_audio(row.path, row.start, row.end)
        if self.augment is not None:
            wave = self.augment(wave, self.most)
        return Utterance(wave, normalize(row.text, self.vocabulary), row.id, row.accent, row.speaker)


def _tell(line: str) -> None:
    if line not in TOLD:
        TOLD.add(line)
        rank_zero_only(print)(line, flush=True)


def _crossing(count: int, total: int, by: Sequence[str]) -> str:
    given = f"data.split_by={','.join(by)}"
    return f"{given}: {count} of {total} utterances belong to different parts and are left out."


def _drawn(rows: Sequence[Row], seconds: Mapping[Row, float], most: float, seed: int) -> list[Row]:
    """Rows in an order drawn from the seed, as many as last `most` seconds, and at least one."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: list[Row] = []
    total = 0.0
    for row in (rows[i] for i in order):
        if not taken or total + seconds[row] <= most:
            taken.append(row)
            total += seconds[row]
    return taken


def _apart(corpus: Any, manifest: Any, root: Any, least: Any, most: Any) -> list[str]:
    """What is wrong in options taken together."""
    found = []
    name, value = (MANIFEST, manifest) if corpus == MANIFEST else ("root", root)
    if value is None and (corpus == MANIFEST or corpus in CORPORA):
        what = "FILE, a CSV, TSV or JSONL file with columns path and text" if corpus == MANIFEST else "FOLDER"
        found.append(f"{name}=null: corpus={corpus} is nowhere yet: give {name}={what}.")
    if is_number(least) and is_number(most) and most <= least:
        found.append(f"max_seconds={most!r}: give a number above min_seconds={least!r}.")
    return found
