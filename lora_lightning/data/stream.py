"""StreamDataModule: picture sets that fit no memory or disk, read from shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.utils.data import Sampler

from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.pictures import Part, PictureDataModule, tell
from lora_lightning.data.stream_litdata import LitdataShards
from lora_lightning.data.stream_order import WindowShuffle
from lora_lightning.data.stream_parquet import ParquetShards
from lora_lightning.data.stream_pictures import Shards, StreamedPictures, unknown_labels
from lora_lightning.data.stream_sources import find_shards
from lora_lightning.data.stream_tar import TarShards
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.utils.checks import options_of, require
from lora_lightning.utils.marks import Check, above, at_least, is_whole, path

NAME = Check("a path, a pattern or an address", lambda v: isinstance(v, str) and bool(v.strip()))
PATTERNS = Check(
    "a path, a pattern such as shards/train-{000..099}.tar or an address, or a list of them",
    lambda v: NAME.test(v) or (isinstance(v, Sequence) and len(v) > 0 and all(map(NAME.test, v))),
)
Source = Annotated[str | Sequence[str], PATTERNS]
CLASSES = Check(
    "a file with one class a line, or a JSON list, or how many classes there are",
    lambda v: v >= 2 if is_whole(v) else path().test(v),
)
GB = 2**30
MANY = 100  # labels, from which on they are doubted:
GAPS = 10  # classes to each label that is found are too many,
ALIKE = 3  # and so are words of which each has fewer pictures


class StreamDataModule(PictureDataModule):
    """Pictures in shards: tar files (WebDataset), Parquet (Hugging Face), or folders that litdata optimized.

    A shard is a tar file, a row group of Parquet, or a chunk of litdata's. In training the shards come in
    another order in each epoch, and the samples of `window` shards are mixed; each process reads shards of
    its own. All is a function of the seed and the epoch, so that a run resumes in the middle of an epoch with
    the very sample that was next, whatever the number of workers.

    Args:
        source: the shards to train on, by path, braces (`{000..099}`, `{a,b}`), glob or address
            (`s3://bucket/…`, with fsspec's package for it).
        val_source: those to validate on; None holds out `val_share`.
        test_source: those to test on; None takes the validation pictures.
        val_share: the share of the shards, at least one, that is held out of training.
        image, label: the columns of Parquet, the keys of litdata's items; `label` is also the field of a
            tar's `.json`. In a tar, `.cls` comes before `.json` and `.txt`.
        class_names: a file with one class a line, or a JSON list, or how many there are; None takes the names
            of Parquet's metadata, else the labels that are found.
        window: shards whose samples are mixed.
        memory: GB that the row groups of one worker may take; fewer are mixed where `window` takes more.
        index: the folder of the tar shards' indices.
        strict: damaged shards and pictures that are seen when the shards are indexed end the run before it
            begins; otherwise they are left out.
        **options: of `PictureDataModule`, but `shots` and the balanced sampler.

    Raises:
        ConfigError: one line for each bad option.
    """

    @options_of(PictureDataModule)
    def __init__(
        self,
        source: Source,
        val_source: Source | None = None,
        test_source: Source | None = None,
        val_share: Annotated[float, above(0, below=1)] = 0.02,
        image: str = "image",
        label: str = "label",
        class_names: Annotated[str | int | None, CLASSES] = None,
        window: Annotated[int, at_least(1)] = 16,
        memory: Annotated[float, above(0)] = 0.5,
        index: Annotated[str, path()] = "~/.cache/lora_lightning/shards",
        strict: bool = True,
        **options: Any,
    ) -> None:
        unfit = []
        if (shots := options.get("shots")) is not None:
            unfit.append(f"shots={shots}: needs the whole set at once; give shots=null for a stream.")
        if (imbalance := options.get("imbalance")) == "balanced_sampler":
            unfit.append(
                f"imbalance={imbalance}: needs the whole set at once; give imbalance=null, class_weights or "
                "logit_adjustment for a stream."
            )
        require(StreamDataModule, {**locals(), **options}, unfit)
        super().__init__(**options)
        self.sources = {"source": source, "val_source": val_source, "test_source": test_source}
        self.val_share, self.image, self.label = val_share, image, label
        self.named, self.window, self.memory, self.strict = class_names, window, memory, strict
        self.index = Path(index).expanduser().absolute()
        self.findings = ""
        self._shards: dict[str, Shards] = {}

    def prepare_data(self) -> None:
        self._open()
        if self.findings:
            tell(f"The shards:\n\n{self.findings}\n")

    def read(self, part: Part) -> StreamedPictures:
        self._open()
        option = {"train": "source", "val": "val_source", "test": "test_source"}[part]
        if part == "test" and option not in self._shards:
            return self.read("val")
        if option in self._shards and (part != "train" or "val_source" in self._shards):
            shards = self._shards[option]
            numbers = list(range(len(shards.counts)))
        else:
            shards = self._shards["source"]
            train, val = self._split([n for n, count in enumerate(shards.counts) if count])
            numbers = train if part == "train" else val
        self._check_labels(option, shards)
        numbers = [n for n in numbers if shards.counts[n]]
        return StreamedPictures(shards, numbers, self.class_names, self._by_name())

    def _split(self, shards: Sequence[int]) -> tuple[list[int], list[int]]:
        """Numbers of the shards to train on and of those held out."""
        count = len(shards)
        if count < 2:
            raise ConfigError(
                [
                    f"val_share={self.val_share}: there is one shard alone, which cannot be divided; give "
                    "val_source, or write more shards (rows in more groups)."
                ]
            )
        held = min(count - 1, max(1, round(self.val_share * count)))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        train, val = (sorted(shards[i] for i in part) for part in (order[held:], order[:held]))
        return train, val

    def training_order(self, pictures: Any) -> Sampler[int]:
        return WindowShuffle(pictures.counts, self._window())

    def _window(self) -> int:
        shards = self._shards["source"]
        return shards.window if isinstance(shards, ParquetShards) else self.window

    def _open(self) -> None:
        """Find, check and index the shards, once."""
        if self._shards:
            return
        findings = Findings("The shards")
        shards = {
            option: self._opened(option, source, findings)
            for option, source in self.sources.items()
            if source is not None
        }
        self.findings = findings.settle(self.strict)
        if empty := [option for option, one in shards.items() if not sum(one.counts)]:
            raise DataError(
                f"data.{empty[0]}={self.sources[empty[0]]}: no picture is left. Mend what is told "
                f"here.\n\n{self.findings}"
            )
        self._shards = shards
        self.class_names = self._classes(shards["source"])
        if self._window() < self.window:
            tell(
                f"{self._window()} row groups are mixed, not data.window={self.window}: more would not fit "
                f"data.memory={self.memory} GB. Smaller row groups mix better."
            )

    def _opened(self, option: str, source: Any, findings: Findings) -> Shards:
        kind, names = find_shards(f"data.{option}", source)
        if kind == "tar":
            return TarShards(names, self.index, self.label, self.window + 1, findings)
        if kind == "parquet":
            budget = int(self.memory * GB)
            return ParquetShards(names, self.image, self.label, self.window, budget, findings)
        return LitdataShards(names, self.image, self.label, findings)

    def _classes(self, shards: Shards) -> list[str]:
        if isinstance(self.named, int):
            return [str(i) for i in range(self.named)]
        if self.named is not None:
            return read_class_names(self.named)
        if shards.class_names:
            return shards.class_names
        numbers = [v for v in shards.labels if isinstance(v, int)]
        if numbers and len(numbers) == len(shards.labels):
            return _counted(max(numbers) + 1, len(numbers))
        if not shards.labels:
            raise ConfigError(
                [
                    "class_names=null: the shards do not say which classes there are; give a file with one "
                    "class a line, or how many there are."
                ]
            )
        return _words(sorted(map(str, shards.labels)), sum(shards.counts))

    def _by_name(self) -> bool:
        """Whether labels that look like numbers are names, since others to train on are words."""
        return any(isinstance(label, str) for label in self._shards["source"].labels)

    def _check_labels(self, option: str, shards: Shards) -> None:
        known, by_name = set(self.class_names), self._by_name()
        strange = [
            v
            for v in shards.labels
            if (not 0 <= v < len(known) if isinstance(v, int) and not by_name else str(v) not in known)
        ]
        if strange:
            told = self.sources[option] or self.sources["source"]
            raise DataError(f"data.{option}={told}: {unknown_labels(strange, self.class_names)}")


def _counted(classes: int, found: int) -> list[str]:
    """Classes by number, of which not all need be found."""
    if classes > MANY and classes > GAPS * found:
        raise ConfigError(
            [
                f"class_names=null: {found:,} labels are found, and the greatest is {classes - 1:,}: numbers "
                "of classes count from 0 without such gaps. Give how many there are, or labels that count."
            ]
        )
    return [str(i) for i in range(classes)]


def _words(found: list[str], pictures: int) -> list[str]:
    """Classes by word, which captions are not."""
    if len(found) > MANY and ALIKE * len(found) > pictures:
        raise ConfigError(
            [
                f"class_names=null: {pictures:,} pictures have {len(found):,} labels, such as "
                f"{found[0][:60]!r}: captions are no classes. Give data.label=FIELD, which holds the class, "
                "or the names."
            ]
        )
    return found


def read_class_names(file: str) -> list[str]:
    """The names of the classes, of class 0 first: one a line, or a JSON list.

    Raises:
        MissingFileError: there is no such file.
        ConfigError: it holds fewer than two names, or a name twice.
    """
    place = Path(os.path.expanduser(file))
    try:
        text = place.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingFileError(
            f"data.class_names={file}: cannot be read: {error.strerror}. Give a file with a class a line."
        ) from None
    try:
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except ValueError as error:
        raise ConfigError([
            f"class_names={file}: is no JSON list ({str(error)[:100]}): write [\"A\", \"B\"], or a class "
            "a line."
        ]) from None  # fmt: skip
    names = [str(name).strip() for name in names if str(name).strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or twice:
        told = f"names {twice[0]!r} twice" if twice else f"holds {len(names)} names"
        raise ConfigError([f"class_names={file}: {told}; give each class its own line, two or more."])
    return names
