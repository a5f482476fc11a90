"""What a method gave, and the table that sets methods side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_lightning.app.methods import METHODS, SCRATCH
from lora_lightning.tasks.scores import Score
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.tables import format_table

WIDEST = 120  # characters of a table
COSTS = ("trained parameters", "% of total", "seconds", "checkpoint MB")


@dataclass(frozen=True)
class Result:
    """What one method gave; None where nothing was trained or saved."""

    method: str
    scores: dict[str, float]  # of the test data, by name, as the task logs them
    trained: int
    total: int
    seconds: float | None = None
    checkpoint_bytes: int | None = None
    best_validation: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of scores, by name
    scratch: bool = False  # the base was random
    title: str = ""  # in place of the method's name

    @property
    def label(self) -> str:
        """The method in words."""
        return self.title or label(self.method, self.scratch)

    def line(self, scores: Sequence[Score]) -> str:
        """The result in a line, as it is told when a method of several has ended."""
        told = [f"test {s.label.removesuffix(' %')} {s.show(self.scores.get(s.name))}" for s in scores[:1]]
        trained = f"{self.trained:,} parameters trained" if self.trained else "nothing trained"
        seconds = [] if self.seconds is None else [f"{self.seconds:.1f} s"]
        return f"{self.label}: {' · '.join([*told, trained, *seconds])}"

    def row(self, scores: Sequence[Score], before: Result | None = None) -> tuple[str, ...]:
        """The cells under `header(scores)`, and for error rates what has gone of those of `before`."""
        cells = []
        for score in scores:
            value = self.scores.get(score.name)
            cells.append(score.show(value, self.intervals.get(score.name)))
            if score.fewer and before:
                base = before.scores.get(score.name) if before is not self else None
                cells.append(f"{100 * (1 - value / base):.0f}" if base and value is not None else "–")
        return (
            self.label,
            *cells,
            f"{self.trained:,}",
            f"{100 * self.trained / self.total:.2f}",
            "–" if self.seconds is None else f"{self.seconds:.1f}",
            "–" if self.checkpoint_bytes is None else f"{self.checkpoint_bytes / 1e6:.2f}",
        )


def label(method: str, scratch: bool = False) -> str:
    """A method in words; full fine-tuning of a random base is training from scratch."""
    return SCRATCH if scratch and method == "full" else METHODS[method].label


def header(scores: Sequence[Score], before: Result | None = None) -> tuple[str, ...]:
    """The head of a table of results."""
    fewer = ["fewer %"] if before else []
    labels = [label for s in scores for label in (s.label, *(fewer if s.fewer else []))]
    labels[:1] = [f"test {label}" for label in labels[:1]]  # and so are the others
    return ("method", *labels, *COSTS)


def results_table(results: Sequence[Result], scores: Sequence[Score]) -> str:
    """All results in one plain table; in two, scores and costs, where one would be too wide for a screen."""
    head, rows = results_rows(results, scores)
    whole = format_table(head, rows)
    if len(whole.splitlines()[1]) <= WIDEST:
        return whole
    first = len(head) - len(COSTS)
    costs = [(row[0], *row[first:]) for row in rows]
    values = format_table(head[:first], [row[:first] for row in rows])
    return f"{values}\n\n{format_table((head[0], *COSTS), costs)}"


def results_rows(
    results: Sequence[Result], scores: Sequence[Score]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of that table."""
    before = next((r for r in results if r.method == "none"), None)
    scores = [s for s in scores if s.in_table and any(s.name in r.scores for r in results)]
    return header(scores, before), [result.row(scores, before) for result in results]


def save_results(results: Sequence[Result], path: Path) -> None:
    """The results as JSON, for programs."""
    _write_json([asdict(r) for r in results], path)


def save_together(folder: Path, names: Sequence[str]) -> None:
    """The results of several adapters, which lie in folders of their names, as one file, by name."""
    found = {name: json.loads((folder / name / "results.json").read_text()) for name in names}
    _write_json(found, folder / "results.json")


def _write_json(value: object, path: Path) -> None:
    write_whole(path, lambda file: Path(file).write_text(json.dumps(value, indent=2) + "\n"))
