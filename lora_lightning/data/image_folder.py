"""ImageFolderDataModule: pictures of one's own, in a folder for each class or listed in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image

from lora_lightning.data.decoding import Enough, read_picture
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.folder_parts import assigned, class_names_of, grouped, labelled, one_spelling
from lora_lightning.data.options import Folder
from lora_lightning.data.picture_check import cache_file, checked
from lora_lightning.data.picture_rows import PictureRow, folder_rows
from lora_lightning.data.picture_sets import PictureSet
from lora_lightning.data.picture_table import ambiguity, column_names, read_table, table_rows
from lora_lightning.data.pictures import PARTS, Part, PictureDataModule, Target, tell
from lora_lightning.errors import ConfigError
from lora_lightning.utils.checks import options_of, require
from lora_lightning.utils.marks import TEXT, Check, Null, above, between, listed, path
from lora_lightning.utils.tables import truncate_list

SEPARATOR = Check("what stands between two labels, such as '|'", lambda v: isinstance(v, str) and len(v) > 0)


class PictureFiles(PictureSet):
    """Files of pictures, each read when it is asked for.

    Args:
        rows: the pictures.
        targets: of each, as `PictureSet` has them.
    """

    def __init__(self, rows: Sequence[PictureRow], targets: torch.Tensor) -> None:
        self.files = [row.file for row in rows]
        self.names = [row.name for row in rows]
        self.targets = targets
        if any(row.weight != 1 for row in rows):
            self.weights = torch.tensor([row.weight for row in rows])

    def picture(self, index: int, enough: Enough | None = None) -> Image.Image:
        return read_picture(self.files[index], enough)

    def name(self, index: int) -> str:
        return self.names[index]


class ImageFolderDataModule(PictureDataModule):
    """Pictures in folders named by their classes, with or without such folders for train, val and test (also
    training, valid, validation, dev, testing); or listed in a table with the columns path and label, and
    perhaps split and weight.

    Before training every file is looked at once (`lora_lightning.data.picture_check`). What has no split is
    split by the seed, each class alike; pictures of equal content are never in two parts. Of a missing val or
    test alone the training part gives its share.

    Args:
        root: the folder; of a table the one that its paths are relative to, None for the table's own.
        table: a CSV, TSV or Parquet file.
        label: its column of labels; None looks for label, labels, class, category, target, tags or y.
        target: what is predicted: "class", "classes" (several a picture, or none) or "number"; None is
            "class", and an error where a table's labels may be meant otherwise.
        separator: between the labels of a picture of several classes; None takes `|`, `;` or a comma.
        classes: their names in the order of the model's outputs; None takes those found, sorted.
        group: a column of the table, or a regular expression that finds a part of a file's name (the first
            of its groups that is not empty, or all that matches): pictures of which it is the same are never
            in two parts.
        val_share: share of the pictures for validation.
        test_share: share for testing; 0 tests on the validation pictures, 1 on all.
        strict: end with a table of what cannot be used; False prints it and leaves that out.
        **options: of `PictureDataModule`.

    Attributes:
        findings: the table of what the check has found, after it; an empty text if nothing.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: there is no such folder or table.
        DataError: the table of pictures that cannot be used, with `strict`; or too few are left.
    """

    @options_of(PictureDataModule)
    def __init__(
        self,
        root: Folder | None = None,
        table: Annotated[str | None, path("a CSV, TSV or Parquet file")] = None,
        label: str | None = None,
        target: Annotated[Literal["class", "classes", "number"] | None, Null("what the labels show")] = None,
        separator: Annotated[str | None, SEPARATOR] = None,
        classes: Annotated[Sequence[str] | None, listed("a list of names", TEXT, distinct=True)] = None,
        group: str | None = None,
        val_share: Annotated[float, above(0, below=1)] = 0.1,
        test_share: Annotated[float, between(0, 1)] = 0.1,
        strict: bool = True,
        **options: Any,
    ) -> None:
        wrong = _apart(root, table, label, target, separator, val_share, test_share)
        require(ImageFolderDataModule, {**locals(), **options}, wrong)
        super().__init__(**options)
        self.table = None if table is None else Path(table).expanduser().absolute()
        place = root if root is not None else self.table and self.table.parent
        self.root = Path(str(place)).expanduser().absolute()
        self.label, self.asked_target, self.separator, self.group = label, target, separator, group
        self.classes = None if classes is None else list(classes)
        self.val_share, self.test_share, self.strict = val_share, test_share, strict
        self.findings = ""
        self._rows: dict[Part, list[PictureRow]] = {}

    def prepare_data(self) -> None:
        self._read_all()
        if self.findings:
            tell(f"{self.table or self.root}:\n\n{self.findings}\n")
        tell(self._summary())

    def read(self, part: Part) -> PictureSet:
        self._read_all()
        rows = self._rows[part]
        if self.target == "number":
            return PictureFiles(rows, torch.tensor([float(row.labels[0]) for row in rows]))
        numbers = {name: n for n, name in enumerate(self.class_names)}
        if self.target == "class":
            targets = torch.tensor([numbers[row.labels[0]] for row in rows], dtype=torch.int64)
            return PictureFiles(rows, targets)
        several = torch.zeros(len(rows), len(numbers))
        for place, row in enumerate(rows):
            several[place, [numbers[name] for name in row.labels]] = 1
        return PictureFiles(rows, several)

    def _read_all(self) -> None:
        if self._rows:
            return
        findings = Findings(f"the pictures of {self.table or self.root}")
        self.target, rows = self._listed(findings)
        rows = checked(rows, findings, cache_file(str(self.table or self.root)))
        if self.target != "number":
            rows = one_spelling(rows, findings)
        shares = {"val": self.val_share, "test": self.test_share}
        parts = assigned(rows, self.target, shares, self.seed, findings)
        if self.target != "number":
            self.class_names = class_names_of(parts, self.classes, findings)
        self.findings = findings.settle(self.strict)
        self._require_enough(parts)
        self._rows = {part: parts[part] for part in PARTS}

    def _listed(self, findings: Findings) -> tuple[Target, list[PictureRow]]:
        """What is predicted, and the pictures with their labels and groups, before any is opened."""
        if self.table is None:
            rows, target, column = folder_rows(self.root, findings), self.asked_target or "class", None
        else:
            table = read_table(self.table)
            names = column_names(table, self.label)
            column = self.group if self.group in table.columns else None
            rows = table_rows(table, names, self.root, column, findings)
            unclear = None if self.asked_target else ambiguity(rows, self.table)
            if unclear:
                raise ConfigError([unclear])
            target = self.asked_target or "class"
        if self.group is not None and column is None:
            rows = grouped(rows, self.group, findings)
        return target, labelled(rows, target, self.separator, findings, self.table is not None)

    def _require_enough(self, parts: dict[str, list[PictureRow]]) -> None:
        """Nothing if there is something to train on, to validate and to test.

        Raises:
            DataError: what lacks.
        """
        place = self.table or self.root
        shares = f"data.val_share={self.val_share:g}, data.test_share={self.test_share:g}"
        told = f"\n\n{self.findings}" if self.findings else ""
        if self.test_share < 1:
            if empty := [part for part in PARTS if not parts[part]]:
                count = sum(map(len, parts.values()))
                raise DataError(
                    f"{place}: of {count} pictures none is left for {' and '.join(empty)}; give more, or "
                    f"other shares ({shares}).{told}"
                )
            if self.target == "class" and len(self.class_names) < 2:
                raise DataError(
                    f"{place}: holds one class alone, {self.class_names[0]!r}: there is nothing to tell "
                    "apart. Put the pictures of each class into a folder of its name; pictures of none of "
                    f"them may be a class, too.{told}"
                )
        elif not parts["test"]:
            raise DataError(f"{place}: no picture is left. Mend what is told here.{told}")

    def _summary(self) -> str:
        counts = ", ".join(f"{part} {len(self._rows[part]):,}" for part in PARTS)
        if self.target == "number":
            what = "a number for each picture"
        else:
            what = f"{len(self.class_names)} classes ({truncate_list(self.class_names, 6)})"
        return f"{(self.table or self.root).name}: {what}; pictures: {counts}."


def _apart(
    root: Any, table: Any, label: Any, target: Any, separator: Any, val_share: Any, test_share: Any
) -> list[str]:
    """What is wrong in options taken together."""
    found = []
    if root is None and table is None:
        found.append(
            "root=null: give root=FOLDER, which has a folder of pictures for each class, or "
            "data.table=FILE.csv."
        )
    if table is None:
        for name, value in (("label", label), ("separator", separator)):
            if value is not None:
                found.append(f"{name}={value}: is of a table; give data.table=FILE.csv, or {name}=null.")
        if target in ("classes", "number"):
            found.append(f"target={target}: folders say one class; give data.table=FILE.csv with the labels.")
    both = [val_share, test_share]
    if all(isinstance(v, (int, float)) for v in both) and test_share < 1 <= val_share + test_share:
        found.append(
            f"test_share={test_share}: with data.val_share={val_share} nothing is left to train on; give "
            "less."
        )
    return found
