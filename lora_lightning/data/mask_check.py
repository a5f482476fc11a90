"""The check of pictures and their masks before training: every mask is read once, and counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.data.decoding import MENDED, ROTATED, UNUSABLE, image_size, opened_image, problems_of
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.mask_files import IGNORED, MOST_CLASSES, Legend, codes_of, count_codes
from lora_lightning.data.mask_pairs import Files, Parts
from lora_lightning.data.picture_check import same_pictures
from lora_lightning.utils.progress import working

LOSSY = (".jpg", ".jpeg")
ORDER = ("train", "val", "test")  # what is in two parts stays in the later one


class FileFindings(Findings):
    """Findings whose places are shown without the folder in which all of them are."""

    def __init__(self, subject: str, folder: Path) -> None:
        super().__init__(subject)
        self.prefix = f"{folder}/"

    def add(self, what: str, where: str, remedy: str, harmless: bool = False) -> None:
        super().add(what, where.replace(self.prefix, ""), remedy, harmless)


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture, its mask, and how many pixels of which code the mask has."""

    picture: Path
    mask: Path
    codes: Mapping[int, int]


def read_pairs(parts: Parts, coloured: bool, findings: Findings) -> dict[str, list[Pair]]:
    """The pairs whose files can be read and fit each other."""
    checked: dict[Files, Pair | None] = {}
    return {
        part: [
            pair
            for files in working(several, f"checking {part}", "pairs")
            for pair in _checked(files, coloured, findings, checked)
        ]
        for part, several in parts.items()
    }


def _checked(
    files: Files, coloured: bool, findings: Findings, checked: dict[Files, Pair | None]
) -> Iterator[Pair]:
    """The pair, if it can be used; a pair of two parts is looked at once."""
    if files not in checked:
        checked[files] = _pair(*files, coloured, findings)
    if pair := checked[files]:
        yield pair


def _pair(picture: Path, mask: Path, coloured: bool, findings: Findings) -> Pair | None:
    bad = False
    for problem in problems_of(picture, whole=False):
        unusable = problem in UNUSABLE
        bad |= unusable
        findings.add(problem, str(picture), "dropped" if unusable else MENDED[problem], not unusable)
    if mask.suffix.lower() in LOSSY:
        findings.add("mask as JPEG, which changes indices", str(mask), "dropped")
        return None
    try:
        codes = codes_of(mask, coloured)
    except DataError as error:
        kind = "mask in colours without data.colours" if "in colours" in str(error) else "broken mask"
        findings.add(kind, str(mask), "dropped")
        return None
    size = None if bad else _upright_size(picture)
    if size and size != codes.shape[::-1]:
        told = f"{mask}: {codes.shape[1]} x {codes.shape[0]}, {picture.name} {size[0]} x {size[1]}"
        findings.add("mask of another size than its picture", told, "dropped")
        return None
    counts = count_codes(codes)
    if counts is None:
        findings.add("mask with more values than classes can be", str(mask), "dropped")
    return None if bad or counts is None else Pair(picture, mask, counts)


def _upright_size(file: Path) -> tuple[int, int] | None:
    """(width, height) as the picture is shown, turned by its EXIF mark."""
    size = image_size(file)
    if size is None:
        return None
    with opened_image(file) as image:
        turned = image.getexif().get(ROTATED, 1) in (5, 6, 7, 8)
    return size[::-1] if turned else size


def highest_class(pairs: Mapping[str, list[Pair]], ignore_index: int | None, subject: str) -> int:
    """The greatest index in masks whose classes nobody has named.

    Raises:
        DataError: they are no indices of two classes or more.
    """
    found = {code for several in pairs.values() for pair in several for code in pair.codes}
    classes = found - {ignore_index}
    if len(classes) < 2:
        values = ", ".join(map(str, sorted(found)[:5])) or "nothing"
        ignored = f", of which {ignore_index} is ignored" if ignore_index in found else ""
        raise DataError(
            f"{subject} hold {values}{ignored}: that is not two classes. If each value is a class, give "
            "data.colours=FILE, a YAML file such as 'background: 0' and 'object: 255' in two lines."
        )
    if max(classes) >= MOST_CLASSES:
        raise DataError(
            f"{subject} hold the index {max(classes)}; there may be {MOST_CLASSES} classes, from 0. Give "
            "data.colours=FILE, a YAML file that says which value is which class, or data.ignore_index."
        )
    return max(classes)


def known_codes(pairs: Mapping[str, list[Pair]], legend: Legend, findings: Findings) -> dict[str, list[Pair]]:
    """The pairs with something to learn or to score; unknown indices and empty masks are findings."""
    told: set[Path] = set()
    kept: dict[str, list[Pair]] = {}
    for part, several in pairs.items():
        kept[part] = []
        for pair in several:
            unknown = {code: count for code, count in pair.codes.items() if code not in legend.classes}
            empty = all(legend.classes.get(code, IGNORED) == IGNORED for code in pair.codes)
            if pair.mask not in told:
                told.add(pair.mask)
                for code, count in unknown.items():
                    where = f"{pair.mask}: {_shown(code, legend)}, {count:,} pixels"
                    what = "colour" if legend.coloured else "index"
                    findings.add(f"{what} that no class has", where, "ignored")
                if empty and not unknown:
                    findings.add("mask without a pixel of any class", str(pair.mask), "dropped")
            if not empty:
                kept[part].append(pair)
    return kept


def without_doubles(
    pairs: Mapping[str, list[Pair]], findings: Findings
) -> tuple[dict[str, list[Pair]], dict[Path, int]]:
    """The pairs without those whose picture a later one of the given parts has too, and a number for each
    picture, equal for pictures of equal content."""
    listed = [(part, pair) for part, several in pairs.items() for pair in several]
    files = [pair.picture for _, pair in listed]
    contents = {file: number for number, file in enumerate(files)}
    gone: set[int] = set()
    for places in same_pictures([str(file) for file in files]):
        contents |= dict.fromkeys((files[p] for p in places), places[0])
        parts = [listed[p][0] for p in places if listed[p][0] in ORDER]
        last = max(parts, key=ORDER.index, default="")
        if again := [p for p in places if listed[p][0] != last] if last else []:
            told = " and ".join(dict.fromkeys(str(files[p]) for p in places))
            findings.add("picture that is in two parts", told, "kept in the later of train, val, test")
            gone.update(again)
    kept: dict[str, list[Pair]] = {part: [] for part in pairs}
    for place, (part, pair) in enumerate(listed):
        if place not in gone:
            kept[part].append(pair)
    return kept, contents


def tell_unseen(training: Sequence[Pair], legend: Legend, findings: Findings) -> None:
    """Classes that training does not see are findings, too."""
    seen = {legend.classes.get(code) for pair in training for code in pair.codes}
    for number, name in enumerate(legend.names):
        if number not in seen:
            findings.add("class without a pixel to train on", f"{number}: {name}", "never learned", True)


def _shown(code: int, legend: Legend) -> str:
    return f"#{code:06x}" if legend.coloured else str(code)
