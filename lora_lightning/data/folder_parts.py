"""From the rows of a folder or table to the parts of a data set: labels, groups, doubles, split, classes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.picture_check import same_pictures
from lora_lightning.data.picture_rows import PictureRow
from lora_lightning.data.picture_split import binned, joined, split
from lora_lightning.data.picture_table import number_of, separated
from lora_lightning.errors import ConfigError

ORDER = ("train", "val", "test")  # what is in two parts stays in the later one
Rows = list[PictureRow]


def labelled(
    rows: Sequence[PictureRow], target: str, separator: str | None, findings: Findings, table: bool
) -> Rows:
    """The rows with their labels as the target needs them; those that have none are left out and told."""
    if not table:
        return list(rows)
    kept = []
    if target == "classes":
        apart = separated([row.labels[0] for row in rows], separator)
        by_file: dict[str, PictureRow] = {}
        for row, labels in zip(rows, apart, strict=True):
            before = by_file.get(row.file)  # a row for each label is another way to write them
            both = labels if before is None else tuple(dict.fromkeys((*before.labels, *labels)))
            by_file[row.file] = replace(before or row, labels=both)
        return list(by_file.values())
    for row in rows:
        if not row.labels[0]:
            findings.add("row without a label", row.name, "left out")
        elif target == "number" and number_of(row.labels[0]) is None:
            findings.add("label that is no number", f"{row.name}: {row.labels[0]}", "left out")
        else:
            kept.append(row)
    return kept


def grouped(rows: Sequence[PictureRow], pattern: str, findings: Findings) -> Rows:
    """The rows with the groups that a regular expression finds in their names.

    Raises:
        ConfigError: it is none, or finds nothing.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            [
                f"group={pattern}: is no column of the table, and no regular expression ({error}): give "
                "one of the two."
            ]
        ) from None
    found = [compiled.search(row.name) for row in rows]
    if not any(found):
        example = f", such as {rows[0].name}" if rows else ""
        raise ConfigError(
            [
                f"group={pattern}: is no column of a table, and as a regular expression matches no file's "
                f"name{example}. Give one that matches the part by which pictures belong together, such as "
                "'([^/_]+)_'."
            ]
        )
    kept = []
    for row, match in zip(rows, found, strict=True):
        taken = [] if match is None else match.groups() if compiled.groups else [match[0]]
        group = next(filter(None, taken), "")  # of alternatives the one that matched
        if not group:
            findings.add("picture that data.group does not match", row.name, "a group of its own", True)
            kept.append(row)
        else:
            kept.append(replace(row, group=group))
    return kept


def one_spelling(rows: Sequence[PictureRow], findings: Findings) -> Rows:
    """The rows with classes whose names differ in case or blanks alone made one, which is told."""
    counts = Counter(label for row in rows for label in row.labels)
    spellings: dict[str, list[str]] = defaultdict(list)
    for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        spellings[" ".join(label.casefold().split())].append(label)
    meant = {label: found[0] for found in spellings.values() for label in found}
    for found in spellings.values():
        if len(found) > 1:
            told = " and ".join(f"{label!r} ({counts[label]:,})" for label in found)
            findings.add(
                "class whose name differs in case or blanks alone", told, f"all of class {found[0]!r}"
            )
    return [replace(row, labels=tuple(dict.fromkeys(meant[x] for x in row.labels))) for row in rows]


def assigned(
    rows: Rows, target: str, shares: Mapping[str, float], seed: int, findings: Findings
) -> dict[str, Rows]:
    """The rows by part. What the listing says holds; what it leaves open is split by the seed.

    Args:
        rows: with labels.
        target: as the data module has it.
        shares: of val and test.

    Raises:
        DataError: parts are given, and there is nothing to train on.
    """
    if shares["test"] == 1:
        return {"train": [], "val": [], "test": list(rows)}
    if any(row.part for row in rows):
        for row in rows:
            if not row.part:
                findings.add("row without a split, which others have", row.name, "left out")
        rows = [row for row in rows if row.part]
    given = [part for part in ORDER if any(row.part == part for row in rows)]
    if given and "train" not in given:
        raise DataError(f"there is {' and '.join(given)}, but no train: give a part to train on.")
    same = same_pictures([row.file for row in rows])
    rows, same = _without_doubles(rows, same, findings)
    if given:
        rows, same = _without_crossing(rows, same, findings)
    lacking = {part: share for part, share in shares.items() if part not in given}
    free = [place for place, row in enumerate(rows) if row.part in ("", "train")]
    if free and any(lacking.values()):
        for place, part in zip(free, _split(rows, free, same, target, lacking, seed), strict=True):
            rows[place] = replace(rows[place], part=part)
    parts = {part: [row for row in rows if (row.part or "train") == part] for part in ORDER}
    if "test" in lacking and not lacking["test"]:
        parts["test"] = parts["val"]
    return parts


def _split(
    rows: Rows, free: list[int], same: list[list[int]], target: str, shares: Mapping[str, float], seed: int
) -> list[str]:
    new = {place: number for number, place in enumerate(free)}
    groups: list[Hashable] = [rows[p].group or (p,) for p in free]
    within = [[new[p] for p in found if p in new] for found in same]
    chosen = [rows[p] for p in free]
    labels: Sequence[tuple[Hashable, ...]] = [row.labels for row in chosen]
    if target == "number":
        least = min(share for share in shares.values() if share > 0)
        labels = binned([float(row.labels[0]) for row in chosen], least)
    kinds = len(set(groups))
    wanted = 1 + sum(share > 0 for share in shares.values())
    if any(row.group for row in chosen) and kinds < wanted:
        raise ConfigError(
            [f"group: finds {kinds} groups for {wanted} parts: give one that finds {wanted} or more."]
        )
    named = [f"{row.name}\0{place}" for place, row in enumerate(chosen)] if _repeats(chosen) else None
    names = named or [row.name for row in chosen]
    return split(names, labels, joined(groups, within), shares, seed)


def _repeats(rows: Rows) -> bool:
    return len({row.name for row in rows}) < len(rows)


def _without_doubles(rows: Rows, same: list[list[int]], findings: Findings) -> tuple[Rows, list[list[int]]]:
    """Without pictures of equal content that have different labels, or are in several parts."""
    gone: set[int] = set()
    for places in same:
        told = " and ".join(dict.fromkeys(rows[p].name for p in places))
        if len({frozenset(rows[p].labels) for p in places}) > 1:
            findings.add("picture that has two labels", told, "left out")
            gone.update(places)
        elif len({rows[p].part for p in places}) > 1:
            last = max((rows[p].part for p in places), key=ORDER.index)
            findings.add("picture that is in two parts", told, "kept in the later of train, val, test")
            gone.update(p for p in places if rows[p].part != last)
        else:
            findings.add("picture that is there twice", told, "kept, in one part", harmless=True)
    return _kept(rows, same, gone)


def _without_crossing(rows: Rows, same: list[list[int]], findings: Findings) -> tuple[Rows, list[list[int]]]:
    """Without pictures of a group that is in several of the given parts, but for the last of these."""
    parts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        parts[row.group].add(row.part)
    gone = set()
    for place, row in enumerate(rows):
        if row.group and row.part != max(parts[row.group], key=ORDER.index):
            findings.add("group that is in two parts", f"{row.group}: {row.name}", "left out of the earlier")
            gone.add(place)
    return _kept(rows, same, gone)


def _kept(rows: Rows, same: list[list[int]], gone: set[int]) -> tuple[Rows, list[list[int]]]:
    new = {place: number for number, place in enumerate(p for p in range(len(rows)) if p not in gone)}
    return [rows[p] for p in new], [[new[p] for p in places if p in new] for places in same]


def class_names_of(parts: dict[str, Rows], asked: Sequence[str] | None, findings: Findings) -> list[str]:
    """The names of the classes in order; pictures of others are left out of `parts`, which is told.

    Args:
        parts: is changed.
        asked: the names; None takes those of the training part, or of the only one.
    """
    found = {part: {x for row in rows for x in row.labels} for part, rows in parts.items()}
    trained = found["train"] if parts["train"] else found["test"]
    names = _in_order(trained) if asked is None else list(asked)
    for part in ORDER:
        kept = []
        for row in parts[part]:
            if strange := [x for x in row.labels if x not in names]:
                why = "that train has not" if asked is None else "that data.classes has not"
                findings.add(f"picture of a class {why}", f"{row.name}: {strange[0]}", "left out")
            else:
                kept.append(row)
        parts[part] = kept
        if parts["train"] and part != "train":
            for name in names:
                if name not in found[part]:
                    findings.add(f"class without a picture in {part}", name, "not measured there", True)
    return names


def _in_order(names: set[str]) -> list[str]:
    """Sorted; names that are numbers, in the order of these."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
