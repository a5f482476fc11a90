"""Pictures and their masks found by name, in folders or a table; what has no other half is a finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lora_lightning.data.decoding import SUFFIXES
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.picture_rows import PART_NAMES
from lora_lightning.data.picture_table import read_table
from lora_lightning.errors import MissingFileError, did_you_mean

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jpg", ".jpeg")
WHOLE = ""  # the part of pairs that no folder and no column has put into one
T = TypeVar("T")
Files = tuple[Path, Path]  # a picture and its mask
Parts = dict[str, list[Files]]


def folder_pairs(root: Path, images: str, masks: str, mask_suffix: str, findings: Findings) -> Parts:
    """Pairs of `root/images` and `root/masks`, or of the parts in them, or of both folders in each part.

    A picture and its mask have the same path in their folders, but for the ending and `mask_suffix` before
    it.

    Raises:
        MissingFileError: there are no such folders.
        DataError: not one picture has a mask.
    """
    places = _places(root, images, masks)
    pairs: Parts = {}
    lonely: dict[str, list[str]] = {"picture": [], "mask": []}
    for part, (pictures_at, masks_at) in places.items():
        pictures = _by_name(pictures_at, SUFFIXES, "", findings)
        found = _by_name(masks_at, MASK_SUFFIXES, mask_suffix, findings)
        both = [name for name in pictures if name in found]
        pairs[part] = [(pictures[name], found[name]) for name in both]
        lonely["picture"] += [str(f) for name, f in pictures.items() if name not in found]
        lonely["mask"] += [str(f) for name, f in found.items() if name not in pictures]
    if not any(pairs.values()):
        raise DataError(_no_pairs(root, lonely, mask_suffix))
    for file in lonely["picture"]:
        findings.add("picture without a mask", file, "left out")
    for file in lonely["mask"]:
        findings.add("mask without a picture", file, "left out")
    return pairs


def _places(root: Path, images: str, masks: str) -> dict[str, Files]:
    """The folder of pictures and that of masks, by part."""
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.glob("*") if p.is_dir()])
        raise MissingFileError(f"root={root}: there is no such folder.{near} Give one that there is.")
    outer = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower() in PART_NAMES}
    places = {
        PART_NAMES[name.lower()]: (part / images, part / masks)
        for name, part in outer.items()
        if (part / images).is_dir() and (part / masks).is_dir()
    }
    if places:
        return places
    at = root / images, root / masks
    if gone := [p.name for p in at if not p.is_dir()]:
        near = did_you_mean(gone[0], [p.name for p in root.iterdir() if p.is_dir()])
        raise MissingFileError(
            f"root={root}: has no folder {' and no folder '.join(gone)}, nor has a folder train, val or test "
            f"in it.{near} data.images=NAME and data.masks=NAME give others."
        )
    inner = [p.name for p in at[0].iterdir() if p.is_dir() and p.name.lower() in PART_NAMES]
    if inner and all((at[1] / name).is_dir() for name in inner):
        return {PART_NAMES[name.lower()]: (at[0] / name, at[1] / name) for name in sorted(inner)}
    return {WHOLE: at}


def _by_name(folder: Path, suffixes: Sequence[str], ending: str, findings: Findings) -> dict[str, Path]:
    """Files by their path in the folder without its ending; hidden ones left out."""
    named: dict[str, Path] = {}
    files = (f for f in sorted(folder.rglob("*")) if f.suffix.lower() in suffixes and f.is_file())
    for file in files:
        if file.name.startswith(".") or not file.stem.endswith(ending):
            continue
        name = str(file.relative_to(folder).with_suffix("")).removesuffix(ending)
        if name in named:
            findings.add("second file of a name", f"{file} beside {named[name].name}", "left out")
        named.setdefault(name, file)
    return named


def _no_pairs(root: Path, lonely: Mapping[str, list[str]], mask_suffix: str) -> str:
    pictures, masks = ([Path(f).stem for f in lonely[kind]] for kind in ("picture", "mask"))
    known = set(pictures)
    endings = Counter(
        mask[cut:] for mask in masks for cut in range(1, len(mask)) if mask[:cut] in known
    ).most_common(1)
    near = f" Did you mean data.mask_suffix={endings[0][0]}?" if endings and not mask_suffix else ""
    some = (
        f"{lonely['picture'][:1]} and {lonely['mask'][:1]}" if pictures and masks else "one of them is empty"
    )
    return (
        f"root={root}: of {len(pictures)} pictures and {len(masks)} masks no two have the same name "
        f"({some}). To a picture a/b.jpg belongs a mask a/b{mask_suffix}.png.{near}"
    )


def table_pairs(path: Path, findings: Findings) -> Parts:
    """Pairs of a CSV, TSV or Parquet file with the columns `path` and `mask`, relative to its folder, and
    perhaps `split`.

    Raises:
        MissingFileError: there is no such file.
        DataError: it is no such table, or not one of its files is there.
    """
    table = read_table(path)
    columns = {str(name).strip().lower(): name for name in table.columns}
    if gone := [c for c in ("path", "mask") if c not in columns]:
        has = ", ".join(map(str, table.columns)) or "nothing"
        raise DataError(
            f"table={path}: has no column {' and no column '.join(gone)}, but {has}: give it path, mask "
            "and, where the parts are given, split."
        )
    pairs: Parts = {}
    for line, row in table.rows:
        cells = {name: str(row.get(column) or "").strip() for name, column in columns.items()}
        where = f"{path.name}: line {line}"
        part = cells.get("split", WHOLE).lower()
        if part and part not in PART_NAMES:
            findings.add("row of an unknown split", f"{where}: {part}", "left out")
            continue
        files = [path.parent / Path(cells[column]).expanduser() for column in ("path", "mask")]
        gone_files = [f for f in files if not f.is_file()]
        for file in gone_files:
            findings.add("row whose file is missing", f"{where}: {file}", "left out")
        if not gone_files:
            pairs.setdefault(PART_NAMES.get(part, WHOLE), []).append((files[0], files[1]))
    if not any(pairs.values()):
        raise DataError(
            f"table={path}: none of its pictures and masks is there: give data.root=FOLDER, where they lie."
        )
    return pairs


def split_parts(
    pairs: Mapping[str, Sequence[T]],
    val_share: float,
    test_share: float,
    seed: int,
    content: Callable[[T], Hashable],
) -> dict[str, list[T]]:
    """Pairs by part: those that none was given to are shuffled and dealt out; where there are only parts for
    training, validation pictures are taken from them. Test pictures are the validation's where there are no
    others.

    Args:
        val_share, test_share: of the pairs that are dealt out.
        content: of a pair; those of one content come into one part.
    """
    parts = {part: list(pairs.get(part, [])) for part in ("train", "val", "test")}
    free = list(pairs.get(WHOLE, []))
    tested = 0
    if not free and not parts["val"]:
        free, parts["train"] = parts["train"], []
        tested = len(parts["test"])
    alike: dict[Hashable, list[T]] = {}
    for pair in free:
        alike.setdefault(content(pair), []).append(pair)
    dealt = list(alike.values())
    order = torch.randperm(len(dealt), generator=torch.Generator().manual_seed(seed)).tolist()
    for part, share in (("test", 0.0 if tested else test_share), ("val", val_share)):
        count = min(len(order), max(1, round(share * len(dealt)))) if share and dealt else 0
        taken, order = sorted(order[:count]), order[count:]
        parts[part] += [pair for i in taken for pair in dealt[i]]
    parts["train"] += [pair for i in sorted(order) for pair in dealt[i]]
    return {**parts, "val": parts["val"] or parts["test"], "test": parts["test"] or parts["val"]}
