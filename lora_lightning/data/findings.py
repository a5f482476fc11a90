"""Findings: what a check of a data set has found wrong, counted by kind, as one table and one error."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_lightning.errors import UserError
from lora_lightning.utils.tables import format_table

SHOWN = 3  # places named of each kind


class DataError(UserError, ValueError):
    """A data set that cannot be trained on as it is; the message is the table of what and where."""


@dataclass
class _Kind:
    remedy: str
    harmless: bool
    count: int = 0
    places: list[str] = field(default_factory=list)


class Findings:
    """Collects what is wrong with a data set while it is read once.

    Example::

        >>> found = Findings("the annotations")
        >>> found.add("a box of negative size", "a.json: annotation 7", "dropped")
        >>> print(found.table())
        what                    count  where                 with data.strict=false
        ──────────────────────  ─────  ────────────────────  ──────────────────────
        a box of negative size      1  a.json: annotation 7  dropped
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._kinds: dict[str, _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(self, what: str, where: str, remedy: str, harmless: bool = False) -> None:
        """One more of a kind.

        Args:
            what: the kind, in the singular.
            where: file and entry, so that a person finds it.
            remedy: what happens to it when the check is not strict.
            harmless: it is mended in any case and stops nothing.
        """
        kind = self._kinds.setdefault(what, _Kind(remedy, harmless))
        kind.count += 1
        if len(kind.places) < SHOWN:
            kind.places.append(where)

    def count(self, what: str) -> int:
        """How many of a kind there are."""
        return self._kinds[what].count if what in self._kinds else 0

    def table(self) -> str:
        """Kinds, counts, the first places of each, and what happens to them."""
        rows: list[tuple[str, ...]] = []
        for what, kind in sorted(self._kinds.items(), key=lambda item: item[1].harmless):
            first, *others = kind.places
            rows.append((what, f"{kind.count:,}", first, kind.remedy))
            rows += [("", "", place, "") for place in others]
            if (more := kind.count - len(kind.places)) > 0:
                rows.append(("", "", f"and {more:,} more", ""))
        return format_table(("what", "count", "where", "with data.strict=false"), rows)

    def settle(self, strict: bool) -> str:
        """The table, or an empty text where nothing was found.

        Raises:
            DataError: `strict`, and something is not harmless.
        """
        if strict and any(not kind.harmless for kind in self._kinds.values()):
            raise DataError(
                f"{self.subject} cannot be trained on as they are:\n\n{self.table()}\n\n"
                "Mend the files, or give data.strict=false, which treats them as the last column says."
            )
        return self.table() if self else ""
